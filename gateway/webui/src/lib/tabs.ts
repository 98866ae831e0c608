/** Tells other tabs of this browser that something has changed on the server. */

export type Change = { session: number | null };

const channel = new BroadcastChannel('tpserve');

/** `session`: the one that changed; null: the list only. */
export function tellTabs(session: number | null): void {
  channel.postMessage({ session } satisfies Change);
}

/** What it gives back ends it, as with the others. */
export function onOtherTab(handler: (change: Change) => void): () => void {
  const hear = (event: MessageEvent<Change>) => handler(event.data);
  channel.addEventListener('message', hear);
  return () => channel.removeEventListener('message', hear);
}

/** Calls when the reader comes back to this tab. */
export function onReturn(handler: () => void): () => void {
  const look = () => {
    if (document.visibilityState === 'visible') handler();
  };
  document.addEventListener('visibilitychange', look);
  addEventListener('focus', look);
  return () => {
    document.removeEventListener('visibilitychange', look);
    removeEventListener('focus', look);
  };
}
