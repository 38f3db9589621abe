/** Points of charts from what the server counted. */

import type { History, Now } from "@trimtab/client";

const MINUTE_S = 60;
/** Up to this span the points of the last minutes stand as close as they came. */
const FINE_S = 3600;

export interface Point {
  time: number;
  /** Requests and generated tokens a second. */
  requests: number;
  rate: number;
  running: number;
  waiting: number;
  first: { mean: number | null; p95: number | null };
  between: { mean: number | null; p95: number | null };
  queue: number | null;
}

/** The buckets of the past, and the last minutes in the steps in which they came where the span is short. */
export function pointsOf(history: History | null, recent: readonly Now[], span: number): Point[] {
  const fine = span <= FINE_S ? recent.slice(1) : [];
  const from = fine[0]?.at ?? Infinity;
  const width = history?.bucket_s ?? MINUTE_S;
  const past = (history?.data ?? []).filter((one) => one.start + width <= from).map((one) => point(one.start + width / 2, width, one));
  return [...past, ...fine.map((one, i) => point(one.at, Math.max(one.at - (recent[i]?.at ?? 0), 0.001), one))];
}

function point(time: number, seconds: number, one: Omit<Now, "at">): Point {
  const asked = Object.values(one.requests).reduce((total, count) => total + count, 0);
  return {
    time,
    requests: asked / seconds,
    rate: one.generated_tokens / seconds,
    running: one.running,
    waiting: one.waiting + one.queued,
    first: one.first_token,
    between: one.between_tokens,
    queue: one.queue.p95,
  };
}
