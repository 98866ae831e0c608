/** Short notices at the edge of the page, and what a screen reader is told. */

export interface Notice {
  id: number;
  text: string;
  isError: boolean;
  action?: { label: string; run: () => void };
}

const SHOWN_MS = 7000;
let last = 0;
let shown = $state<Notice[]>([]);
let spoken = $state('');

export const notices = {
  get shown(): Notice[] {
    return shown;
  },
  /** For the live region. */
  get spoken(): string {
    return spoken;
  },
};

/** One with the same text takes the place of the older, whose action is out of date. */
export function notify(text: string, action?: Notice['action'], isError = false): void {
  const id = ++last;
  shown = [...shown.filter((notice) => notice.text !== text).slice(-2), { id, text, isError, ...(action ? { action } : {}) }];
  setTimeout(() => dismiss(id), isError ? 2 * SHOWN_MS : SHOWN_MS);
}

export function dismiss(id: number): void {
  shown = shown.filter((notice) => notice.id !== id);
}

export function say(text: string): void {
  spoken = text;
}

/** Speaks a text that grows, one finished sentence after the other. */
export class Speaker {
  #said = 0;

  hear(text: string): void {
    const rest = text.slice(this.#said);
    let end = 0;
    for (const match of rest.matchAll(/[.!?…:]["'”’)]*\s+|\n+/g)) end = match.index + match[0].length;
    if (end > 0) this.#speak(text, this.#said + end);
  }

  finish(text: string): void {
    if (text.length > this.#said) this.#speak(text, text.length);
  }

  #speak(text: string, end: number): void {
    const piece = text.slice(this.#said, end).replace(/[*_`#>|]+/g, '').trim();
    this.#said = end;
    if (piece) say(piece);
  }
}
