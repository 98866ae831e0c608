/** The objects of the HTTP API, as docs/http.md and docs/protocol.md have them. */

export type Kind = 'story' | 'chat';
export type Role = 'system' | 'user' | 'assistant';
export type FinishReason = 'stop' | 'length';

/** What is not given, or null, is the model's own default. */
export interface SamplingParams {
  max_tokens?: number | null;
  temperature?: number | null;
  top_k?: number | null;
  top_p?: number | null;
  min_p?: number | null;
  seed?: number | null;
  repetition_penalty?: number | null;
  stop?: string[];
  n?: number;
  [other: string]: unknown;
}

export interface Timings {
  queue_s: number;
  ttft_s: number;
  time_per_token_s: number;
  prefill_s: number;
  decode_s: number;
  prefill_tokens_per_s: number;
  decode_tokens_per_s: number;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  cached_tokens: number;
}

export interface SessionInfo {
  id: number;
  kind: Kind;
  title: string;
  model: string | null;
  system: string | null;
  params: SamplingParams;
  created: number;
  updated: number;
  leaf: number | null;
}

export interface StoredMessage {
  id: number;
  parent: number | null;
  role: Role;
  content: string;
  prompt_tokens: number;
  completion_tokens: number;
  timings: Timings | null;
  model: string | null;
  finish_reason: FinishReason | null;
  partial: boolean;
  created: number;
  position: number;
  siblings: number[];
}

export interface SessionState {
  session: SessionInfo;
  messages: StoredMessage[];
  can_undo: boolean;
  can_redo: boolean;
}

export interface SessionHit {
  session: number;
  title: string;
  message: number | null;
  text: string;
}

/** Passed on as it is. */
export type SessionExport = Record<string, unknown>;

export interface ModelInfo {
  name: string;
  path: string;
  model_type: string;
  dtype: string;
  kv_dtype: string;
  parameters: number;
  max_model_len: number;
  vocab_size: number;
  kv_capacity_tokens: number;
  has_chat_template: boolean;
  state: 'ready' | 'loading' | 'unloading';
  weight_bytes: number[];
  kv_bytes: number[];
}

export interface RankProgress {
  rank: number;
  bytes_done: number;
  bytes_total: number;
  seconds_left: number | null;
}

export interface LoadWish {
  name: string;
  path: string;
  dtype?: string;
  kv_dtype?: string;
  max_model_len?: number;
}

export type LoadEvent =
  | { model: ModelInfo }
  | { model: string; phase: 'waiting' | 'opening' | 'reading' | 'testing'; ranks: RankProgress[] };

export interface WorkerStatus {
  rank: number;
  pid: number;
  virtual_shards: number[];
  memory_bytes: number;
  compute_s: number;
  comm_s: number;
}

export interface Percentiles {
  p50: number;
  p99: number;
}

export interface Status {
  version: string;
  ready: boolean;
  uptime_s: number;
  epoch: number;
  comm: string;
  kernels: string;
  workers: WorkerStatus[];
  models: ModelInfo[];
  queued: Record<string, number>;
  running: number;
  totals: { tokens_computed: number; tokens_generated: number; jobs_done: number; steps: number };
  queue_time: Percentiles;
  ttft: Percentiles;
  time_per_token: Percentiles;
  kv_blocks_used: number;
  kv_blocks_total: number;
}

/** What a turn sends while it runs. */
export type TurnEvent =
  | { event: 'queued'; position: number }
  | { event: 'started'; model: string; prompt_tokens: number }
  | { event: 'token'; text: string; index?: number }
  | { event: 'progress'; position: number | null; new_tokens: number }
  | { event: 'stored'; user_message: number | null; answers: number[] }
  | {
      event: 'done';
      model: string;
      usage: Usage;
      timings: Timings;
      choices: { index?: number; text: string; finish_reason: FinishReason }[];
    }
  | { event: 'failed'; code: string; message: string; retry_after_s?: number | null }
  | { event: 'cancelled' };

export type TurnAction =
  | { action: 'send'; text: string }
  | { action: 'regenerate'; message?: number }
  | { action: 'edit'; message: number; text: string }
  | { action: 'continue' };

export interface Alternative {
  text: string;
  probability: number;
}
