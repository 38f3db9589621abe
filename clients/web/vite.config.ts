import { svelte } from "@sveltejs/vite-plugin-svelte";
import { svelteTesting } from "@testing-library/svelte/vite";
import { fileURLToPath } from "node:url";
import { defineConfig } from "vite";

export default defineConfig({
  // Relative addresses: the server may be behind a path prefix that nobody knows at build time.
  base: "./",
  // In tests only: Svelte as the browser gets it, and what a test drew is taken away after it.
  plugins: [svelte(), svelteTesting()],
  resolve: {
    alias: { "@trimtab/client": fileURLToPath(new URL("../typescript/src/index.ts", import.meta.url)) },
  },
  build: {
    target: "es2022",
    // Nothing is inlined: the page allows neither inline scripts nor data in style sheets.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    sourcemap: false,
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000", "/health": "http://127.0.0.1:8000" } },
});
