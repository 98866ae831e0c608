/** The sessions of the sidebar. */

import { ApiError, describe, sessions } from './api';
import { notify, type Notice } from './notices.svelte';
import { goTo, route } from './route.svelte';
import { tellTabs } from './tabs';
import type { Kind, SessionExport, SessionInfo } from './types';

/** The server takes no longer request, and an import is one. */
const LONGEST_IMPORT_BYTES = 1_000_000;

class SessionList {
  all = $state.raw<SessionInfo[]>([]);
  cursor = $state<string | null>(null);
  /** Null until the server has answered. */
  loaded = $state(false);
  /** Is to be deleted, and could not be brought back: the user has to say so. */
  asked = $state.raw<{ info: SessionInfo; bytes: number } | null>(null);
  /** Why there is none. */
  problem = $state('');

  async refresh(): Promise<void> {
    try {
      const page = await sessions.list(null);
      const seen = new Set(page.sessions.map(({ id }) => id));
      // Pages that were fetched before stay, behind the new first one.
      const oldest = page.sessions.at(-1)?.updated ?? 0;
      const later = this.loaded && page.cursor !== null ? this.all.filter((s) => !seen.has(s.id) && s.updated < oldest) : [];
      this.all = [...page.sessions, ...later];
      if (later.length === 0) this.cursor = page.cursor;
      this.loaded = true;
      this.problem = '';
    } catch (error) {
      // That the server is away is said elsewhere.
      if (error instanceof ApiError && (error.isAway || error.status === 401)) return;
      this.problem = describe(error);
    }
  }

  async more(): Promise<void> {
    if (this.cursor === null) return;
    const page = await sessions.list(this.cursor);
    const seen = new Set(this.all.map(({ id }) => id));
    this.all = [...this.all, ...page.sessions.filter(({ id }) => !seen.has(id))];
    this.cursor = page.cursor;
  }

  /** A new session, or an empty one that is there already. */
  async create(kind: Kind, model?: string): Promise<void> {
    try {
      const unused = this.all.find(
        (s) => s.kind === kind && s.leaf === null && !s.title && !s.system && model === undefined,
      );
      const id = unused?.id ?? (await sessions.create(kind, model === undefined ? {} : { model })).session.id;
      goTo({ page: kind, id });
      await this.refresh();
      tellTabs(null);
    } catch (error) {
      notify(describe(error), undefined, true);
    }
  }

  async rename(id: number, title: string): Promise<void> {
    try {
      const { session } = await sessions.change(id, { title });
      this.all = this.all.map((s) => (s.id === id ? session : s));
      tellTabs(id);
    } catch (error) {
      notify(describe(error), undefined, true);
    }
  }

  async remove(info: SessionInfo): Promise<void> {
    try {
      const kept = await sessions.export(info.id);
      const bytes = new Blob([JSON.stringify(kept)]).size;
      if (bytes > LONGEST_IMPORT_BYTES) this.asked = { info, bytes };
      else await this.#remove(info, { label: 'Undo', run: () => void this.import(kept) });
    } catch (error) {
      notify(describe(error), undefined, true);
    }
  }

  async removeForGood(info: SessionInfo): Promise<void> {
    this.asked = null;
    try {
      await this.#remove(info);
    } catch (error) {
      notify(describe(error), undefined, true);
    }
  }

  async #remove(info: SessionInfo, undo?: Notice['action']): Promise<void> {
    await sessions.remove(info.id);
    this.all = this.all.filter(({ id }) => id !== info.id);
    if ('id' in route.current && route.current.id === info.id) goTo({ page: 'home' });
    notify(`“${titleOf(info)}” is deleted.`, undo);
    tellTabs(info.id);
  }

  async import(data: SessionExport): Promise<void> {
    try {
      const { session } = await sessions.import(data);
      goTo({ page: session.kind, id: session.id });
      await this.refresh();
      tellTabs(null);
    } catch (error) {
      notify(`This cannot be imported: ${describe(error)}`, undefined, true);
    }
  }

  async importFile(file: File): Promise<void> {
    let data: SessionExport;
    try {
      data = JSON.parse(await file.text()) as SessionExport;
    } catch {
      notify(`${file.name} is not a session: a session is exported as JSON.`, undefined, true);
      return;
    }
    await this.import(data);
  }

  async export(info: SessionInfo): Promise<void> {
    try {
      const data = JSON.stringify(await sessions.export(info.id), null, 1);
      const name = titleOf(info).replace(/[^\p{L}\p{N}]+/gu, '-').slice(0, 60) || 'session';
      download(`${name}.json`, data, 'application/json');
    } catch (error) {
      notify(describe(error), undefined, true);
    }
  }
}

export function titleOf(info: SessionInfo): string {
  return info.title || (info.kind === 'chat' ? 'New chat' : 'New story');
}

export function download(name: string, content: string, type: string): void {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export const list = new SessionList();
