/** The last minutes of the server's own counters, read while somebody looks. */

import { rowsOf, sum, type Row } from "./metrics.js";
import { said, server } from "./server.svelte.js";

const EVERY_MS = 5000;
const KEPT = 240;

export interface Point {
  time: number;
  running: number;
  waiting: number;
  /** Generated tokens a second since the point before, null for the first one. */
  rate: number | null;
  /** Seconds to the first token, mean of the requests since the point before. */
  first: number | null;
  /** Seconds between tokens, likewise. */
  between: number | null;
}

export class Live {
  rows = $state.raw<Row[]>([]);
  points = $state.raw<Point[]>([]);
  failure = $state("");
  #timer: ReturnType<typeof setInterval> | undefined;
  #before: { time: number; rows: Row[] } | null = null;

  /** Begin to read; the returned function ends it. In a tab that nobody sees nothing is asked. */
  start(): () => void {
    const tick = () => {
      if (!document.hidden) {
        void this.read();
      }
    };
    tick();
    this.#timer = setInterval(tick, EVERY_MS);
    return () => clearInterval(this.#timer);
  }

  async read(): Promise<void> {
    try {
      const rows = rowsOf(await server.client.metrics());
      const time = Date.now() / 1000;
      this.points = [...this.points, this.#point(time, rows)].slice(-KEPT);
      this.rows = rows;
      this.#before = { time, rows };
      this.failure = "";
    } catch (error) {
      this.failure = said(error);
      server.failed(error);
    }
  }

  #point(time: number, rows: Row[]): Point {
    const before = this.#before;
    const grown = (name: string) => (before === null ? 0 : Math.max(0, sum(rows, name) - sum(before.rows, name)));
    const mean = (name: string) => {
      const count = grown(`${name}_count`);
      return count === 0 ? null : grown(`${name}_sum`) / count;
    };
    return {
      time,
      running: sum(rows, "trimtab_engine", { stat: "running" }),
      waiting: sum(rows, "trimtab_engine", { stat: "waiting" }),
      rate: before === null ? null : grown("trimtab_generated_tokens_total") / Math.max(time - before.time, 0.001),
      first: mean("trimtab_time_to_first_token_seconds"),
      between: mean("trimtab_time_per_output_token_seconds"),
    };
  }
}
