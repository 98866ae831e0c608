/** Tells other tabs of this browser that something has changed on the server. */

export type Change = { session: number | null };

const channel = new BroadcastChannel('tpserve');

/** `session`: the one that changed; null: the list only. */
export function tellTabs(session: number | null): void {
  channel.postMessage({ session } satisfies Change);
}

export function onOtherTab(handler: (change: Change) => void): void {
  channel.addEventListener('message', (event: MessageEvent<Change>) => handler(event.data));
}

/** Calls when the reader comes back to this tab. */
export function onReturn(handler: () => void): void {
  document.addEventListener('visibilitychange', () => {
    if (document.visibilityState === 'visible') handler();
  });
  addEventListener('focus', handler);
}
