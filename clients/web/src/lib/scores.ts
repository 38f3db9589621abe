/** Scores of a monitor as a map of layers by tokens. */

export interface MonitorReport {
  probe: string;
  site: string;
  layers: number[];
  form: string;
  threshold: number | null;
  direction: "above" | "below";
  status: "read" | "failed";
  reason: string | null;
  choices: { index: number; prompt: Record<string, number[]>; generation: Record<string, number[]> }[];
}

/** One row per layer, the last layer first. */
export function scoreRows(report: MonitorReport): { layer: number; scores: number[] }[] {
  const choice = report.choices[0];
  return [...report.layers].sort((a, b) => b - a).map((layer) => ({ layer, scores: choice?.prompt[String(layer)] ?? [] }));
}

/**
 * The score at which a colour is full, of each layer by itself, because sizes grow with depth. Many models use the first
 * token as a sink, whose score says nothing about the text and would drown the rest.
 */
export function fullest(scores: readonly number[], threshold: number | null): number {
  const sizes = (scores.length > 1 ? scores.slice(1) : scores).map((score) => Math.abs(score - (threshold ?? 0)));
  return Math.max(...sizes, 0) || 1;
}

/** Whether a score is on the side of the threshold on which the concept lies; null where none is recorded. */
export function met(score: number, threshold: number | null, direction: "above" | "below"): boolean | null {
  return threshold === null ? null : direction === "above" ? score > threshold : score < threshold;
}
