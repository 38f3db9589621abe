/** What the server counted: the past from its own store, the present as it tells it. Nothing is asked again and again. */

import type { Alert, History, Now } from "@trimtab/client";

import { pointsOf } from "./points.js";
import { said, server } from "./server.svelte.js";

const AGAIN_MS = 3000;
const KEPT = 240;

export class Live {
  /** Seconds that are shown. */
  span = $state(3600);
  history = $state.raw<History | null>(null);
  alerts = $state.raw<Alert[]>([]);
  /** What came while the page is open, oldest first. */
  recent = $state.raw<Now[]>([]);
  failure = $state("");
  /** Counts up when what is stored should be read again: by hand, and at each new minute while somebody looks. */
  turn = $state(0);
  #stop = new AbortController();

  readonly now = $derived(this.recent.at(-1) ?? null);
  readonly points = $derived(pointsOf(this.history, this.recent, this.span));

  /** Begin to follow; the returned function ends it. */
  start(): () => void {
    void this.#follow();
    return () => this.#stop.abort();
  }

  refresh(): void {
    this.turn += 1;
  }

  /** Read the past. Called when `span` or `turn` changes. */
  async load(span: number): Promise<void> {
    try {
      const since = Math.floor(Date.now() / 1000) - span;
      const [history, alerts] = await Promise.all([server.client.history({ since }), server.client.alerts()]);
      if (span === this.span) {
        this.history = history;
        this.alerts = alerts.data;
      }
      this.failure = "";
    } catch (error) {
      this.#fail(error);
    }
  }

  async #follow(): Promise<void> {
    const stop = this.#stop.signal;
    while (!stop.aborted) {
      try {
        for await (const now of server.client.live({ signal: stop })) {
          const before = this.recent.at(-1);
          this.recent = [...this.recent, now].slice(-KEPT);
          if (before !== undefined && minute(now.at) > minute(before.at) && !document.hidden) {
            this.refresh();
          }
        }
      } catch (error) {
        if (!stop.aborted) {
          this.#fail(error);
        }
      }
      // The stream ends with the server, or with the network: another one is asked for after a while.
      await pause(AGAIN_MS, stop);
    }
  }

  #fail(error: unknown): void {
    this.failure = said(error);
    server.failed(error);
  }
}

const minute = (at: number) => Math.floor(at / 60);

function pause(milliseconds: number, stop: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    stop.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
