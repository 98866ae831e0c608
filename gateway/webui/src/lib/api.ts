/** Calls of the server. Knows the routes and their errors; keeps nothing but the API key. */

import { createParser, type EventSourceMessage } from 'eventsource-parser';

import type {
  Alternative,
  Kind,
  LoadEvent,
  LoadWish,
  ModelInfo,
  SamplingParams,
  SessionExport,
  SessionHit,
  SessionInfo,
  SessionState,
  Status,
  TurnAction,
  TurnEvent,
} from './types';

const KEY_NAME = 'tpserve.key';
/** A gateway that is started again keeps its socket: a request may wait for it. */
const ANSWER_TIMEOUT_MS = 15_000;
/** A turn says every second that it goes on: one that is silent for so long was lost. */
const LONGEST_SILENCE_MS = 15_000;

/** What the server refused, or, with status 0, that it could not be reached. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly code: string,
    readonly status: number,
    readonly retryAfterS: number | null = null,
  ) {
    super(message);
  }

  /** Nobody answered, or the server behind the gateway is away: it is worth trying again. */
  get isAway(): boolean {
    return this.status === 0 || this.status === 502 || this.status === 503;
  }
}

export function describe(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

let key = localStorage.getItem(KEY_NAME) ?? sessionStorage.getItem(KEY_NAME) ?? '';
let onKeyWanted: (wasWrong: boolean) => void = () => {};

/** Called when the server wants a key, or another one. */
export function whenKeyWanted(handler: (wasWrong: boolean) => void): void {
  onKeyWanted = handler;
}

export function setKey(value: string, remember: boolean): void {
  key = value;
  localStorage.removeItem(KEY_NAME);
  sessionStorage.removeItem(KEY_NAME);
  (remember ? localStorage : sessionStorage).setItem(KEY_NAME, value);
}

interface Call {
  method?: string;
  body?: unknown;
  signal?: AbortSignal;
  /** The page is being left: the browser is to send it all the same. */
  keepalive?: boolean;
}

async function call(path: string, { method, body, signal, keepalive }: Call): Promise<Response> {
  const headers: Record<string, string> = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers['Content-Type'] = 'application/json';
  const usedKey = key;
  let response: Response;
  try {
    response = await fetch(path, {
      method: method ?? (body === undefined ? 'GET' : 'POST'),
      headers,
      cache: 'no-store',
      credentials: 'omit',
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      ...(signal ? { signal } : {}),
      ...(keepalive ? { keepalive } : {}),
    });
  } catch (error) {
    if (signal?.aborted && !isTimeout(signal)) throw error;
    throw new ApiError('the server cannot be reached', 'unreachable', 0);
  }
  if (response.ok) return response;
  const refused = await errorOf(response);
  if (refused.status === 401 && usedKey === key) onKeyWanted(key !== '');
  throw refused;
}

function inTime(): AbortSignal {
  return AbortSignal.timeout(ANSWER_TIMEOUT_MS);
}

function isTimeout(signal: AbortSignal): boolean {
  return signal.reason instanceof DOMException && signal.reason.name === 'TimeoutError';
}

async function errorOf(response: Response): Promise<ApiError> {
  const wait = Number(response.headers.get('Retry-After'));
  const retryAfterS = Number.isFinite(wait) && wait > 0 ? wait : null;
  try {
    const { error } = (await response.json()) as { error: { message: string; code: string } };
    return new ApiError(error.message, error.code, response.status, retryAfterS);
  } catch {
    const message = `the server answered with status ${response.status}`;
    return new ApiError(message, 'bad_answer', response.status, retryAfterS);
  }
}

async function ask<T>(path: string, options: Call = {}): Promise<T> {
  const signal = options.signal ?? inTime();
  const response = await call(path, { ...options, signal });
  try {
    return (await response.json()) as T;
  } catch {
    throw new ApiError('the connection was lost in the middle of an answer', 'unreachable', 0);
  }
}

/** Events of a stream, up to its [DONE]. Throws ApiError when it breaks off or brings an error. */
async function* stream<T>(
  path: string,
  body: unknown,
  signal: AbortSignal,
  longestSilenceMs = Infinity,
): AsyncGenerator<T> {
  const response = await call(path, { body, signal });
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  const arrived: EventSourceMessage[] = [];
  const parser = createParser({ onEvent: (event) => arrived.push(event) });
  try {
    for (;;) {
      const { done, value } = await read(reader, signal, longestSilenceMs);
      if (done) throw new ApiError('the stream broke off', 'stream_lost', 0);
      parser.feed(value);
      for (const { data } of arrived.splice(0)) {
        if (data === '[DONE]') return;
        const event = JSON.parse(data) as T | { error: { message: string; code: string } };
        if (isError(event)) throw new ApiError(event.error.message, event.error.code, 500);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function isError(event: unknown): event is { error: { message: string; code: string } } {
  return typeof event === 'object' && event !== null && 'error' in event;
}

async function read(
  reader: ReadableStreamDefaultReader<string>,
  signal: AbortSignal,
  longestSilenceMs: number,
) {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const silence = new Promise<never>((_, reject) => {
    if (longestSilenceMs !== Infinity) timer = setTimeout(reject, longestSilenceMs);
  });
  try {
    return await Promise.race([reader.read(), silence]);
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ApiError('the connection was lost', 'stream_lost', 0);
  } finally {
    clearTimeout(timer);
  }
}

// --- sessions -------------------------------------------------------------------------------------

export interface SessionChange {
  title?: string;
  model?: string | null;
  system?: string | null;
  params?: SamplingParams;
}

const session = (id: number) => `/api/sessions/${id}`;

export const sessions = {
  list: (cursor: string | null) =>
    ask<{ sessions: SessionInfo[]; cursor: string | null }>(
      `/api/sessions?limit=50${cursor === null ? '' : `&cursor=${encodeURIComponent(cursor)}`}`,
    ),
  create: (kind: Kind, change: SessionChange = {}) =>
    ask<SessionState>('/api/sessions', { body: { kind, ...change } }),
  get: (id: number, signal?: AbortSignal) =>
    ask<SessionState>(session(id), signal ? { signal: AbortSignal.any([signal, inTime()]) } : {}),
  change: (id: number, change: SessionChange) =>
    ask<SessionState>(session(id), { method: 'PATCH', body: change }),
  remove: (id: number) => ask<unknown>(session(id), { method: 'DELETE' }),
  search: (words: string, signal: AbortSignal) =>
    ask<{ hits: SessionHit[] }>(
      `/api/sessions/search?limit=50&query=${encodeURIComponent(words)}`,
      { signal },
    ),
  export: (id: number) => ask<SessionExport>(`${session(id)}/export`),
  import: (data: SessionExport) => ask<SessionState>('/api/sessions/import', { body: data }),
  rollback: (id: number, message: number | null) =>
    ask<SessionState>(`${session(id)}/rollback`, { body: { message } }),
  branch: (id: number, message: number) =>
    ask<SessionState>(`${session(id)}/branch`, { body: { message } }),
  undo: (id: number) => ask<SessionState>(`${session(id)}/undo`, { body: {} }),
  redo: (id: number) => ask<SessionState>(`${session(id)}/redo`, { body: {} }),
  setText: (id: number, text: string, keepalive = false) =>
    ask<SessionState>(`${session(id)}/text`, { method: 'PUT', body: { text }, keepalive }),
  turn: (
    id: number,
    { action, ...fields }: TurnAction,
    params: SamplingParams | null,
    signal: AbortSignal,
  ) =>
    stream<TurnEvent>(
      `${session(id)}/${action}`,
      { ...fields, ...(params ? { params } : {}), stream: true },
      signal,
      LONGEST_SILENCE_MS,
    ),
};

// --- models and status ----------------------------------------------------------------------------

export const models = {
  list: async () => (await ask<{ models: ModelInfo[] }>('/api/models')).models,
  load: (wish: LoadWish, signal: AbortSignal) =>
    stream<LoadEvent>('/api/models', { ...wish, stream: true }, signal),
  /** Answers when the model's jobs have ended; with `force` they are ended. */
  unload: (name: string, force: boolean) =>
    ask<{ freed_bytes: number }>(
      `/api/models/${name.split('/').map(encodeURIComponent).join('/')}${force ? '?force=true' : ''}`,
      { method: 'DELETE', signal: new AbortController().signal },
    ),
};

export const status = () => ask<Status>('/api/status');

export async function readiness(): Promise<{ ready: boolean; reason: string }> {
  const response = await fetch('/health/ready', {
    cache: 'no-store',
    signal: inTime(),
  });
  const { status: state, reason } = (await response.json()) as { status: string; reason?: string };
  return { ready: state === 'ready', reason: reason ?? '' };
}

/** The most probable tokens after a text, best first. */
export async function alternatives(
  model: string | null,
  prompt: string,
  signal: AbortSignal,
): Promise<Alternative[]> {
  const body = {
    ...(model === null ? {} : { model }),
    prompt,
    max_tokens: 1,
    temperature: 0,
    logprobs: 8,
  };
  const answer = await ask<{
    choices: { logprobs: { top_logprobs: Record<string, number>[] } }[];
  }>('/v1/completions', { body, signal });
  const top = answer.choices[0]?.logprobs.top_logprobs[0] ?? {};
  return Object.entries(top)
    .map(([text, logprob]) => ({ text, probability: Math.exp(logprob) }))
    .sort((a, b) => b.probability - a.probability);
}
