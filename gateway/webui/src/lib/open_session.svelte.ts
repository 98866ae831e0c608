/** The session that is open: its selected path, and the turn that is under way. */

import { ApiError, describe, sessions, type SessionChange } from './api';
import { connection } from './connection.svelte';
import { list } from './list.svelte';
import { Speaker, say } from './notices.svelte';
import { addRun } from './runs.svelte';
import { tellTabs } from './tabs';
import type { SamplingParams, SessionState, StoredMessage, TurnAction, TurnEvent } from './types';

export interface Turn {
  action: TurnAction['action'];
  /** What the user said with it; null: nothing. */
  userText: string | null;
  /** Messages of the path that stay before it. */
  before: StoredMessage[];
  /** The text that it goes on from, by `continue`. */
  prefix: string;
  /** What has been written, by answer. */
  texts: string[];
  phase: 'sending' | 'queued' | 'reading' | 'writing' | 'full' | 'starting' | 'stopping' | 'lost';
  /** Jobs before it. */
  position: number | null;
  /** Seconds until it is sent again, when the queue is full or the workers are being started. */
  retryInS: number | null;
}

export interface Problem {
  message: string;
  retry: (() => void) | null;
}

/** Refusals that are over in a while, by their code. */
const COMES_LATER: Record<string, Turn['phase']> = { queue_full: 'full', not_ready: 'starting' };
const LOOKS_FOR_KEPT = 12;
const LOOK_MS = 250;

export class OpenSession {
  state = $state.raw<SessionState | null>(null);
  turn = $state<Turn | null>(null);
  problem = $state<Problem | null>(null);
  /** It does not exist (any more). */
  isGone = $state(false);
  /** Of the last turn: what was written, and the ids that it got, in the same order. */
  texts: string[] = [];
  answers: number[] = [];
  /** What the user has yet to send. */
  draft = $state('');
  /** The user has changed a story's text that the server does not have yet. */
  isDirty = $state(false);
  /** Gives the server that text; false when it could not. */
  saveFirst: () => Promise<boolean> = () => Promise.resolve(true);

  #abort: AbortController | null = null;
  #closed = false;

  constructor(readonly id: number) {}

  get messages(): StoredMessage[] {
    return this.state?.messages ?? [];
  }

  get params(): SamplingParams {
    return this.state?.session.params ?? {};
  }

  get last(): StoredMessage | undefined {
    return this.messages.at(-1);
  }

  /** The last answer did not come to its own end. */
  get isCut(): boolean {
    const { last } = this;
    return last?.role === 'assistant' && (last.partial || last.finish_reason === 'length');
  }

  close(): void {
    this.#closed = true;
    this.#abort?.abort();
  }

  async reload(): Promise<void> {
    if (this.turn !== null) return;
    try {
      this.#take(await sessions.get(this.id));
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) this.isGone = true;
      else if (!(error instanceof ApiError && (error.isAway || error.status === 401))) {
        this.problem = { message: describe(error), retry: () => void this.reload() };
      }
    }
  }

  /** A change that generates nothing. Its own answer is the new state. */
  async apply(change: (id: number) => Promise<SessionState>): Promise<boolean> {
    this.problem = null;
    try {
      this.#take(await change(this.id));
      tellTabs(this.id);
      void list.refresh();
      return true;
    } catch (error) {
      this.problem = { message: describe(error), retry: () => void this.apply(change) };
      return false;
    }
  }

  change = (change: SessionChange) => this.apply((id) => sessions.change(id, change));
  rollback = (message: number | null) => this.apply((id) => sessions.rollback(id, message));
  branch = (message: number) => this.apply((id) => sessions.branch(id, message));
  undo = async () => (await this.saveFirst()) && this.apply((id) => sessions.undo(id));
  redo = () => this.apply((id) => sessions.redo(id));

  /** End the turn; what has been written of it is kept. */
  stop(): void {
    if (this.turn === null) return;
    this.turn.phase = 'stopping';
    this.#abort?.abort();
  }

  /** Run a turn to its end; true when it came to one. */
  async run(action: TurnAction, params: SamplingParams | null = null): Promise<boolean> {
    if (this.turn !== null || this.state === null) return false;
    this.problem = null;
    this.answers = [];
    const leaf = this.state.session.leaf;
    const before = this.#pathBefore(action);
    this.turn = {
      action: action.action,
      userText: 'text' in action && action.text ? action.text : null,
      before,
      prefix: action.action === 'continue' ? (this.last?.content ?? '') : '',
      texts: [],
      phase: 'sending',
      position: null,
      retryInS: null,
    };
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    const written = new Written(this.turn);
    let problem: Problem | null = null;
    try {
      await this.#events(action, params, signal, written);
    } catch (error) {
      if (!signal.aborted) {
        const retry = this.#retryOf(action, params, error);
        problem = { message: describe(error).replace(/[.\s]+$/, ''), retry };
        if (error instanceof ApiError && error.isAway) await this.#waitForServer(signal);
      }
    }
    written.finish();
    this.texts = written.texts;
    const kept = written.hasBegun;
    const ended = problem === null && !signal.aborted;
    if (!this.#closed) await this.#afterTurn(leaf, kept && !ended);
    if (this.turn?.userText && action.action === 'send' && !this.#isStored(action.text, before)) {
      this.draft ||= action.text;
    } else if (problem !== null && action.action === 'send') {
      // What was said is there: what is missing is the answer.
      problem.retry = null;
    }
    this.turn = null;
    if (problem !== null && this.isCut) problem.message += '. What was written is kept.';
    this.problem = problem;
    tellTabs(this.id);
    void list.refresh();
    return ended;
  }

  async #events(
    action: TurnAction,
    params: SamplingParams | null,
    signal: AbortSignal,
    written: Written,
  ): Promise<void> {
    for (;;) {
      try {
        for await (const event of sessions.turn(this.id, action, params, signal)) {
          this.#hear(event, written);
        }
        return;
      } catch (error) {
        const phase = error instanceof ApiError ? COMES_LATER[error.code] : undefined;
        if (phase === undefined) throw error;
        await this.#waitToSend(phase, (error as ApiError).retryAfterS ?? 2, signal);
      }
    }
  }

  #hear(event: TurnEvent, written: Written): void {
    const turn = this.turn!;
    switch (event.event) {
      case 'queued':
        turn.phase = 'queued';
        turn.position = event.position;
        break;
      case 'progress':
        turn.position = event.position;
        if (event.position === null) turn.phase = turn.texts.length ? 'writing' : 'reading';
        break;
      case 'started':
        turn.phase = 'reading';
        break;
      case 'token':
        written.add(event.index ?? 0, event.text);
        break;
      case 'stored':
        this.answers = event.answers;
        break;
      case 'done':
        addRun(
          {
            session: this.id,
            message: this.answers[0] ?? null,
            kind: this.state!.session.kind,
            model: event.model,
            usage: event.usage,
            timings: event.timings,
          },
          connection.status,
        );
        break;
      case 'failed':
        throw new ApiError(event.message, event.code, 500, event.retry_after_s ?? null);
      case 'cancelled':
        break;
    }
  }

  async #waitToSend(phase: Turn['phase'], waitS: number, signal: AbortSignal): Promise<void> {
    const turn = this.turn!;
    turn.phase = phase;
    for (let left = Math.ceil(waitS); left > 0; left -= 1) {
      turn.retryInS = left;
      await pause(1000);
      signal.throwIfAborted();
    }
    turn.phase = 'sending';
    turn.retryInS = null;
  }

  /** A turn whose stream was lost goes no further; what it left is read when the server is back. */
  async #waitForServer(signal: AbortSignal): Promise<void> {
    this.turn!.phase = 'lost';
    say('The connection is lost. Waiting for the server.');
    while (!signal.aborted && !this.#closed) {
      await connection.poll();
      if (connection.isUp || connection.phase === 'locked') return;
      await pause(1000);
    }
  }

  /** Read what is stored. The server may still be putting the kept part away. */
  async #afterTurn(leafBefore: number | null, expectsPart: boolean): Promise<void> {
    for (let look = 0; look < LOOKS_FOR_KEPT && !this.#closed; look += 1) {
      try {
        const state = await sessions.get(this.id);
        const last = state.messages.at(-1);
        const settled =
          !expectsPart ||
          (last?.role === 'assistant' && (state.session.leaf !== leafBefore || last.partial));
        if (settled || look === LOOKS_FOR_KEPT - 1) {
          this.#take(state);
          return;
        }
      } catch (error) {
        if (error instanceof ApiError && error.status === 404) {
          this.isGone = true;
          return;
        }
      }
      await pause(LOOK_MS);
    }
  }

  #retryOf(action: TurnAction, params: SamplingParams | null, error: unknown): (() => void) | null {
    const lostInTheMiddle = error instanceof ApiError && error.code === 'stream_lost';
    return lostInTheMiddle
      ? null
      : () => {
          if (action.action === 'send') this.draft = '';
          void this.run(action, params);
        };
  }

  #isStored(text: string, before: StoredMessage[]): boolean {
    return this.messages[before.length]?.content === text;
  }

  #pathBefore(action: TurnAction): StoredMessage[] {
    const path = this.messages;
    if (action.action === 'send') return path;
    if (action.action === 'continue') return path.slice(0, -1);
    const at = path.findIndex(({ id }) => id === action.message);
    const place = at < 0 ? path.length - 1 : at;
    const isQuestion = action.action === 'regenerate' && path[place]?.role !== 'assistant';
    return path.slice(0, isQuestion ? place + 1 : place);
  }

  #take(state: SessionState): void {
    this.state = state;
    this.isGone = false;
  }
}

/** Collects tokens and shows them once per animation frame. */
class Written {
  readonly texts: string[] = [];
  #frame = 0;
  #speaker = new Speaker();

  constructor(private readonly turn: Turn) {}

  get hasBegun(): boolean {
    return this.texts.some((text) => text !== '');
  }

  add(index: number, text: string): void {
    while (this.texts.length <= index) this.texts.push('');
    this.texts[index] += text;
    this.#frame ||= requestAnimationFrame(() => this.#show());
  }

  finish(): void {
    cancelAnimationFrame(this.#frame);
    if (this.hasBegun) this.#show();
    this.#speaker.finish(this.texts[0] ?? '');
  }

  #show(): void {
    this.#frame = 0;
    if (this.turn.phase !== 'stopping') this.turn.phase = 'writing';
    this.turn.texts = [...this.texts];
    this.#speaker.hear(this.texts[0] ?? '');
  }
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
