/** Values in localStorage; what cannot be read or written there is as if it had not been. */

export function load<T>(name: string, otherwise: T): T {
  try {
    const text = localStorage.getItem(`tpserve.${name}`);
    return text === null ? otherwise : (JSON.parse(text) as T);
  } catch {
    return otherwise;
  }
}

export function save(name: string, value: unknown): void {
  try {
    localStorage.setItem(`tpserve.${name}`, JSON.stringify(value));
  } catch {
    // Full, or forbidden: the page works without.
  }
}

export function forget(name: string): void {
  localStorage.removeItem(`tpserve.${name}`);
}
