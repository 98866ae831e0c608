/** Numbers as people read them. */

export function seconds(value: number): string {
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return value < 60 ? `${value.toFixed(value < 10 ? 2 : 1)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function bytes(value: number): string {
  for (const [unit, size] of [['GB', 1e9], ['MB', 1e6], ['kB', 1e3]] as const) {
    if (value >= size) return `${(value / size).toFixed(value >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${value} B`;
}

export function count(value: number): string {
  return value.toLocaleString('en');
}

/** 3.2 M, 1.1 B. */
export function parameters(value: number): string {
  if (value >= 1e9) return `${(value / 1e9).toFixed(1)} B`;
  return value >= 1e6 ? `${(value / 1e6).toFixed(1)} M` : count(value);
}

export function rate(value: number): string {
  return value >= 100 ? count(Math.round(value)) : value.toFixed(1);
}

export function percent(value: number): string {
  return `${(value * 100).toFixed(value < 0.0995 ? 1 : 0)} %`;
}

export function total(values: number[]): number {
  return values.reduce((sum, value) => sum + value, 0);
}

export function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const half = Math.floor(sorted.length / 2);
  return sorted.length % 2 ? sorted[half]! : ((sorted[half - 1] ?? 0) + (sorted[half] ?? 0)) / 2;
}
