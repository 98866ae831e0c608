/** Whether the server is there, what it does at the moment, and whether it wants a key. */

import { ApiError, describe, readiness, setKey, status as askStatus, whenKeyWanted } from './api';
import { onReturn } from './tabs';
import type { Status } from './types';

export type Phase = 'connecting' | 'ready' | 'starting' | 'replacing' | 'unreachable' | 'locked';

const POLL_MS = 2000;
const LONGEST_WAIT_MS = 8000;

class Connection {
  phase = $state<Phase>('connecting');
  /** Why it is not ready. */
  reason = $state('');
  status = $state.raw<Status | null>(null);
  /** Since the last poll; null: not known. */
  tokensPerS = $state<number | null>(null);
  /** Part of the workers' time that was spent in all-reduces. */
  commShare = $state<number | null>(null);
  keyWanted = $state(false);
  keyWasWrong = $state(false);
  /** Seconds until the next try; null: not waiting. */
  retryInS = $state<number | null>(null);

  #before: { at: number; status: Status } | null = null;
  #failures = 0;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #polling = false;
  #onBack = new Set<() => void>();

  get isUp(): boolean {
    return this.phase === 'ready' || this.phase === 'replacing';
  }

  /** Calls each time that the server answers again after it did not. What it gives back ends that. */
  whenBack(handler: () => void): () => void {
    this.#onBack.add(handler);
    return () => this.#onBack.delete(handler);
  }

  start(): void {
    whenKeyWanted((wasWrong) => {
      this.keyWanted = true;
      this.keyWasWrong = wasWrong;
      this.phase = 'locked';
    });
    onReturn(() => this.poll());
    addEventListener('online', () => this.poll());
    void this.poll();
  }

  useKey(key: string, remember: boolean): void {
    setKey(key, remember);
    this.keyWanted = false;
    void this.poll();
  }

  async poll(): Promise<void> {
    if (this.#polling || this.keyWanted) return;
    this.#polling = true;
    clearTimeout(this.#timer);
    this.retryInS = null;
    try {
      this.#take(await askStatus());
    } catch (error) {
      await this.#fail(error);
    } finally {
      this.#polling = false;
      this.#schedule();
    }
  }

  #take(status: Status): void {
    const wasAway = !this.isUp;
    this.#rates(status);
    this.status = status;
    this.#failures = 0;
    this.phase = status.ready ? 'ready' : status.epoch > 1 ? 'replacing' : 'starting';
    this.reason = '';
    if (wasAway && this.isUp) for (const handler of this.#onBack) handler();
  }

  #rates(status: Status): void {
    const before = this.#before;
    this.#before = { at: performance.now(), status };
    if (before === null || before.status.epoch !== status.epoch || before.status.uptime_s > status.uptime_s) {
      this.tokensPerS = null;
      this.commShare = shareOf(status, null);
      return;
    }
    const seconds = (performance.now() - before.at) / 1000;
    const tokens = status.totals.tokens_generated - before.status.totals.tokens_generated;
    this.tokensPerS = tokens / seconds;
    this.commShare = shareOf(status, before.status) ?? this.commShare;
  }

  async #fail(error: unknown): Promise<void> {
    if (error instanceof ApiError && error.status === 401) return;
    this.#failures += 1;
    this.tokensPerS = null;
    if (error instanceof ApiError && error.status === 0) {
      this.phase = 'unreachable';
      this.reason = describe(error);
      return;
    }
    this.phase = this.status === null ? 'starting' : 'replacing';
    try {
      const { reason } = await readiness();
      this.reason = reason || describe(error);
    } catch {
      this.reason = describe(error);
    }
    // The coordinator is away: what is said must be said to be so until it answers.
    if (error instanceof ApiError && error.isAway) this.phase = 'starting';
  }

  #schedule(): void {
    if (this.keyWanted || document.visibilityState === 'hidden') return;
    const wait =
      this.#failures === 0 ? POLL_MS : Math.min(LONGEST_WAIT_MS, 500 * 2 ** this.#failures);
    if (this.#failures > 0) this.retryInS = Math.round(wait / 1000);
    this.#timer = setTimeout(() => void this.poll(), wait);
  }
}

/** Null when no worker has computed anything between the two. */
function shareOf(now: Status, before: Status | null): number | null {
  let compute = 0;
  let comm = 0;
  now.workers.forEach((worker, i) => {
    compute += worker.compute_s - (before?.workers[i]?.compute_s ?? 0);
    comm += worker.comm_s - (before?.workers[i]?.comm_s ?? 0);
  });
  return compute + comm > 1e-4 ? comm / (compute + comm) : null;
}

export const connection = new Connection();
