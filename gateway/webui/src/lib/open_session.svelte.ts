/** The session that is open: its selected path, and the turn that is under way. */

import { ApiError, describe, sessions, type SessionChange } from './api';
import { connection } from './connection.svelte';
import { list } from './list.svelte';
import { say } from './notices.svelte';
import { isBusy, isLost, leftOf, pathBefore, type Step } from './pick_up';
import { addRun } from './runs.svelte';
import { tellTabs } from './tabs';
import { Written, type Turn } from './turn';
import type { SamplingParams, SessionState, StoredMessage, TurnAction, TurnEvent } from './types';

export interface Problem {
  message: string;
  retry: (() => void) | null;
}

/** Refusals that are over in a while, by their code. */
const COMES_LATER: Record<string, Turn['phase']> = { queue_full: 'full', not_ready: 'starting' };
const LOOKS_FOR_KEPT = 12;
const LOOK_MS = 250;
/** So often a turn is picked up again. */
const MOST_PICK_UPS = 5;
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 5000;
const LOOKS_AT_OTHER = 15;
const LOOK_AT_OTHER_MS = 1000;

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
  /** It has changed while a turn was under way. */
  #isStale = false;

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
    if (this.turn !== null) {
      this.#isStale = true;
      return;
    }
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
    const before = pathBefore(action, this.messages);
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
    let lost = false;
    try {
      await this.#toItsEnd({ action, params }, signal, written);
    } catch (error) {
      if (!signal.aborted) {
        lost = isLost(error);
        const retry = this.#retryOf(action, params, error);
        problem = { message: describe(error).replace(/[.\s]+$/, ''), retry };
      }
    }
    written.finish();
    this.texts = written.texts;
    const ended = problem === null && !signal.aborted;
    this.#isStale = false;
    if (!this.#closed) await this.#afterTurn(leaf, written.hasBegun && !ended);
    if (action.action === 'send' && action.text && !this.#isStored(action.text, before)) {
      this.draft ||= action.text;
      if (lost) problem!.message += '. Your message did not arrive: it is in the field again';
    } else if (problem !== null && action.action === 'send') {
      // What was said is there: what is missing is the answer.
      problem.retry = null;
    }
    this.turn = null;
    if (problem !== null && this.isCut) problem.message += '. What was written is kept.';
    this.problem = problem;
    if (this.#isStale) void this.reload();
    tellTabs(this.id);
    void list.refresh();
    return ended;
  }

  /** Each time the stream is lost, go on from what the server has of the turn. */
  async #toItsEnd(asked: Step, signal: AbortSignal, written: Written): Promise<void> {
    const before = this.state!;
    // The other answers of several could not be written on.
    const most = ((asked.params ?? this.params).n ?? 1) > 1 ? 0 : MOST_PICK_UPS;
    let step = asked;
    for (let lost = 0; ; ) {
      try {
        await this.#events(step, signal, written);
        return;
      } catch (error) {
        signal.throwIfAborted();
        if (lost > 0 && isBusy(error)) {
          await this.#watchOther(signal);
        } else if (isLost(error)) {
          this.#say('lost', 'The connection is lost. Trying again.');
          lost += 1;
        } else {
          throw error;
        }
        const now = await this.#storedWhenBack(signal);
        const left = leftOf(asked, before, now);
        if (left === 'nothing') return;
        if (left === 'all' || lost > most) throw error;
        this.#take(now);
        step = left;
        this.#show(step, written);
      }
    }
  }

  async #events({ action, params }: Step, signal: AbortSignal, written: Written): Promise<void> {
    for (;;) {
      let isKept = false;
      try {
        for await (const event of sessions.turn(this.id, action, params, signal)) {
          if (event.event === 'stored') isKept = event.user_message !== null || event.answers.length > 0;
          this.#hear(event, written);
        }
        return;
      } catch (error) {
        const phase = error instanceof ApiError && !isKept ? COMES_LATER[error.code] : undefined;
        if (phase === undefined) throw error;
        await this.#waitToSend(phase, (error as ApiError).retryAfterS ?? 2, signal);
      }
    }
  }

  /** The turn goes on with a step that is not its first. */
  #show({ action }: Step, written: Written): void {
    const turn = this.turn!;
    turn.before = pathBefore(action, this.messages);
    turn.userText = null;
    turn.phase = 'sending';
    written.restart(action.action === 'continue' ? (this.last?.content ?? '') : '');
  }

  #say(phase: Turn['phase'], words: string): void {
    this.turn!.phase = phase;
    say(words);
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
      await pause(1000, signal);
    }
    turn.phase = 'sending';
    turn.retryInS = null;
  }

  /** The session as the server has it, as soon as it is there again. */
  async #storedWhenBack(signal: AbortSignal): Promise<SessionState> {
    for (let waitMs = FIRST_WAIT_MS; ; waitMs = Math.min(2 * waitMs, LONGEST_WAIT_MS)) {
      void connection.poll();
      await pause(waitMs, signal);
      if (!connection.isUp) continue;
      try {
        return await sessions.get(this.id, signal);
      } catch (error) {
        if (!isLost(error)) throw error;
      }
    }
  }

  /** Another page writes in this session: wait for what it stores, or until it is time to ask again. */
  async #watchOther(signal: AbortSignal): Promise<void> {
    this.#say('elsewhere', 'This answer is being written for another page.');
    const { updated } = this.state!.session;
    for (let look = 0; look < LOOKS_AT_OTHER; look += 1) {
      await pause(LOOK_AT_OTHER_MS, signal);
      try {
        const { session } = await sessions.get(this.id, signal);
        if (session.updated !== updated) return;
      } catch (error) {
        if (!isLost(error)) throw error;
      }
    }
  }

  /** Read what is stored. The server may still be putting the kept part away. */
  async #afterTurn(leafBefore: number | null, expectsPart: boolean): Promise<void> {
    for (let look = 0; look < LOOKS_FOR_KEPT && connection.isUp && !this.#closed; look += 1) {
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

  #take(state: SessionState): void {
    this.state = state;
    this.isGone = false;
  }
}

/** Rejects when the signal comes. */
function pause(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      reject(signal!.reason as Error);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener('abort', end);
      resolve();
    }, ms);
    if (signal?.aborted) end();
    else signal?.addEventListener('abort', end, { once: true });
  });
}
