/** A story's text and which parts of it were generated. Positions are UTF-16 units, as in a textarea. */

import type { StoredMessage } from './types';

/** [start, end) of a part that was generated. */
export type Range = [number, number];

export interface Segment {
  text: string;
  generated: boolean;
}

export function textOf(messages: StoredMessage[]): string {
  return messages.map(({ content }) => content).join('');
}

export function generatedRanges(messages: StoredMessage[]): Range[] {
  const ranges: Range[] = [];
  let start = 0;
  for (const { role, content } of messages) {
    if (role === 'assistant') ranges.push([start, start + content.length]);
    start += content.length;
  }
  return merged(ranges);
}

/** The ranges after an edit: what was changed is the user's, the rest has moved along. */
export function afterEdit(ranges: Range[], before: string, after: string): Range[] {
  const shorter = Math.min(before.length, after.length);
  let head = 0;
  while (head < shorter && before[head] === after[head]) head += 1;
  let tail = 0;
  while (tail < shorter - head && before.at(-1 - tail) === after.at(-1 - tail)) tail += 1;
  const shift = after.length - before.length;
  const changedTo = before.length - tail;
  const kept: Range[] = [];
  for (const [start, end] of ranges) {
    kept.push([start, Math.min(end, head)]);
    kept.push([Math.max(start, changedTo) + shift, end + shift]);
  }
  return merged(kept);
}

/** In order, without empty ones, with those that touch as one. */
export function merged(ranges: Range[]): Range[] {
  const result: Range[] = [];
  for (const [start, end] of ranges.filter(([a, b]) => a < b).sort((a, b) => a[0] - b[0])) {
    const last = result.at(-1);
    if (last && start <= last[1]) last[1] = Math.max(last[1], end);
    else result.push([start, end]);
  }
  return result;
}

export function segments(text: string, ranges: Range[]): Segment[] {
  const result: Segment[] = [];
  let at = 0;
  for (const [start, end] of ranges) {
    if (start > at) result.push({ text: text.slice(at, start), generated: false });
    result.push({ text: text.slice(start, end), generated: true });
    at = end;
  }
  if (at < text.length) result.push({ text: text.slice(at), generated: false });
  return result;
}

/** The word at a position, with the white space before it, which its first token has too. */
export function wordAt(text: string, at: number): Range | null {
  let end = at;
  while (end < text.length && /\S/.test(text[end]!)) end += 1;
  let start = at;
  while (start > 0 && /\S/.test(text[start - 1]!)) start -= 1;
  if (start === end) return null;
  while (start > 0 && text[start - 1] === ' ') start -= 1;
  return [start, end];
}
