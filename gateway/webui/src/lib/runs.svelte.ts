/** The last answers with their timings and the server's settings, kept in this browser. */

import { load, save } from './stored';
import type { Kind, Status, Timings, Usage } from './types';

export interface Run {
  at: number;
  session: number;
  message: number | null;
  kind: Kind;
  model: string;
  dtype: string;
  kv_dtype: string;
  workers: number;
  comm: string;
  kernels: string;
  usage: Usage;
  timings: Timings;
}

const KEPT = 200;
let runs = $state.raw<Run[]>(load<Run[]>('runs', []));

export const runList = {
  /** The newest first. */
  get all(): Run[] {
    return runs;
  },
  of: (message: number): Run | undefined => runs.find((run) => run.message === message),
};

export function addRun(run: Omit<Run, 'at' | 'dtype' | 'kv_dtype' | 'workers' | 'comm' | 'kernels'>, status: Status | null): void {
  const model = status?.models.find(({ name }) => name === run.model);
  const settings = {
    dtype: model?.dtype ?? '?',
    kv_dtype: model?.kv_dtype ?? '?',
    workers: status?.workers.length ?? 0,
    comm: status?.comm ?? '?',
    kernels: status?.kernels ?? '?',
  };
  // Another tab may have written since.
  runs = [{ at: Date.now(), ...settings, ...run }, ...load<Run[]>('runs', [])].slice(0, KEPT);
  save('runs', runs);
}

export function clearRuns(): void {
  runs = [];
  save('runs', runs);
}

/** Those settings that optimisations are compared by. */
export function settingsOf(run: Run): string {
  return `${run.model} · ${run.dtype} · ${run.workers} × ${run.comm}`;
}
