import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vite';

// TPSERVE_HTTP_URL=http://127.0.0.1:8000 npm run dev: the page from its sources, the API from a server.
const server = process.env.TPSERVE_HTTP_URL ?? 'http://127.0.0.1:8000';

export default defineConfig({
  plugins: [svelte()],
  build: {
    // What knows light-dark() and text-wrap, so that styles stay as they are written.
    target: ['chrome123', 'edge123', 'firefox121', 'safari17.5'],
    // A data: URL would need an exception in the Content-Security-Policy.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
  server: {
    proxy: Object.fromEntries(
      ['/api', '/v1', '/health', '/version', '/tokenize'].map((path) => [
        path,
        { target: server, headers: { origin: server } },
      ]),
    ),
  },
});
