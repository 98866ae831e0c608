/** Where the page is, kept in the URL's hash so that a reload finds it again. */

export type Route =
  | { page: 'home' }
  | { page: 'chat' | 'story'; id: number }
  | { page: 'models' }
  | { page: 'timings' };

function parse(hash: string): Route {
  const [, page, id] = hash.split('/');
  if ((page === 'chat' || page === 'story') && /^[1-9]\d{0,18}$/.test(id ?? '')) {
    return { page, id: Number(id) };
  }
  return page === 'models' || page === 'timings' ? { page } : { page: 'home' };
}

let current = $state<Route>(parse(location.hash));
addEventListener('hashchange', () => (current = parse(location.hash)));

export const route = {
  get current(): Route {
    return current;
  },
};

export function hrefOf(to: Route): string {
  return 'id' in to ? `#/${to.page}/${to.id}` : to.page === 'home' ? '#/' : `#/${to.page}`;
}

export function goTo(to: Route): void {
  location.hash = hrefOf(to);
  current = to;
}
