/** What graded answers were, as the server tells it. */

export interface Outcome {
  /** A reference; "all" for all steering, "untouched" for answers without. */
  artifact?: string;
  preset?: string;
  minute?: number;
  grader: string;
  answers: number;
  shares: Record<string, number>;
}

const FIRST = ["answered", "refused"];
const LAST = "broken";

/** The outcomes of a grader in the order in which they are shown: broken is the last. */
export function outcomesOf(rows: readonly Outcome[]): string[] {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.shares)))];
  const place = (name: string) => (name === LAST ? 2 : FIRST.includes(name) ? 0 : 1);
  return names.sort((a, b) => place(a) - place(b) || a.localeCompare(b));
}

export function subjectOf(row: Outcome): string {
  return row.artifact === "all" ? "all steering" : row.artifact === "untouched" ? "untouched" : (row.artifact ?? row.preset ?? "");
}

/** Rows of minutes as shares of one outcome over the times of `width` minutes; answers weigh. */
export function overTime(rows: readonly Outcome[], outcomes: readonly string[], width: number): { x: number[]; lines: { name: string; values: number[] }[] } {
  const found = new Map<number, { answers: number; counts: Map<string, number> }>();
  for (const row of rows) {
    const minute = row.minute ?? 0;
    const at = minute - (minute % width);
    const one = found.get(at) ?? { answers: 0, counts: new Map() };
    one.answers += row.answers;
    for (const [name, share] of Object.entries(row.shares)) {
      one.counts.set(name, (one.counts.get(name) ?? 0) + share * row.answers);
    }
    found.set(at, one);
  }
  const times = [...found.keys()].sort((a, b) => a - b);
  return {
    x: times.map((minute) => 60 * minute),
    lines: outcomes.map((name) => ({ name, values: times.map((at) => (found.get(at)?.counts.get(name) ?? 0) / (found.get(at)?.answers || 1)) })),
  };
}
