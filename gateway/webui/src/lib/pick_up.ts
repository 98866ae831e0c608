/** What is left of a turn whose stream was lost, by what the server has stored of it. */

import { ApiError } from './api';
import type { SamplingParams, SessionState, StoredMessage, TurnAction } from './types';

/** A request that a turn, or the rest of one, is asked for with. */
export interface Step {
  action: TurnAction;
  /** Null: the session's own. */
  params: SamplingParams | null;
}

/** Codes with which a server that goes away ends what it has begun. */
const GOING_AWAY = new Set(['not_ready', 'connection_lost']);

/** The turn may have got anywhere: only the server, when it is back, can say how far. */
export function isLost(error: unknown): error is ApiError {
  if (!(error instanceof ApiError)) return false;
  return error.status === 0 || GOING_AWAY.has(error.code) || (error.isAway && error.code === 'bad_answer');
}

export function isBusy(error: unknown): boolean {
  return error instanceof ApiError && error.code === 'session_busy';
}

/** Messages of the path that stay before what an action writes. */
export function pathBefore(action: TurnAction, path: StoredMessage[]): StoredMessage[] {
  if (action.action === 'send') return path;
  if (action.action === 'continue') return path.slice(0, -1);
  const at = path.findIndex(({ id }) => id === action.message);
  const place = at < 0 ? path.length - 1 : at;
  const isQuestion = action.action === 'regenerate' && path[place]?.role !== 'assistant';
  return path.slice(0, isQuestion ? place + 1 : place);
}

/** `asked` is the whole turn, `before` the session as it was then. 'all': not even its text has arrived. */
export function leftOf(asked: Step, before: SessionState, now: SessionState): Step | 'nothing' | 'all' {
  const { action } = asked;
  const old = new Map(before.messages.map((message) => [message.id, message]));
  let [answer, ...later] = now.messages.slice(pathBefore(action, before.messages).length);
  if ('text' in action && action.text) {
    if (answer?.content !== action.text || old.has(answer.id)) {
      return action.action === 'send' ? 'all' : asked;
    }
    [answer, ...later] = later;
    if (!answer) return { action: { action: 'regenerate' }, params: asked.params };
  }
  const was = answer && old.get(answer.id);
  if (!answer || answer.content === was?.content) return asked;
  if (!answer.partial || later.length > 0) return 'nothing';
  return toWriteOn(asked, before, answer.completion_tokens - (was?.completion_tokens ?? 0));
}

/** The rest of an answer is no longer than what it was to have at most. */
function toWriteOn({ params }: Step, before: SessionState, written: number): Step | 'nothing' {
  const whole = params ?? before.session.params;
  const most = whole.max_tokens ?? null;
  if (most === null) return { action: { action: 'continue' }, params };
  if (most <= written) return 'nothing';
  return { action: { action: 'continue' }, params: { ...whole, max_tokens: most - written } };
}
