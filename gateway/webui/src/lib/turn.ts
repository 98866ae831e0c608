/** A turn that is under way, and what it has written. */

import { Speaker } from './notices.svelte';
import type { StoredMessage, TurnAction } from './types';

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
  phase: 'sending' | 'queued' | 'reading' | 'writing' | 'full' | 'starting' | 'stopping' | 'lost' | 'elsewhere';
  /** Jobs before it. */
  position: number | null;
  /** Seconds until it is sent again, when the queue is full or the workers are being started. */
  retryInS: number | null;
}

/** Collects tokens, shows them once per animation frame and speaks them by sentence. */
export class Written {
  /** By answer. */
  texts: string[] = [];
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

  /** What comes now is written behind `prefix`. */
  restart(prefix: string): void {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#speaker = new Speaker();
    this.texts = [];
    this.turn.prefix = prefix;
    this.turn.texts = [];
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
