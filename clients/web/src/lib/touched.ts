/** What a switch would touch, told from what the server counted in the last hour. */

import type { Counts } from "@trimtab/client";

export const HOUR_S = 3600;
const NAMED = 4;

const times = (count: number) => (count === 1 ? "once" : `${count} times`);
const requests = (count: number) => (count === 1 ? "one request" : `${count} requests`);

function asked(counts: Counts): number {
  return Object.values(counts.requests).reduce((sum, count) => sum + count, 0);
}

/** Of turning all steering off. running: completions that are in the engine now. */
export function touchedByKill(counts: Counts, running: number): string[] {
  const uses = Object.entries(counts.uses).sort((a, b) => b[1] - a[1]);
  const more = uses.length > NAMED ? `, and ${uses.length - NAMED} more` : "";
  return [
    asked(counts) === 0
      ? "Nothing was asked in the last hour."
      : `In the last hour ${counts.steered} of ${requests(asked(counts))} were steered${uses.length === 0 ? "" : `, with ${uses.slice(0, NAMED).map(([name, count]) => `${name} (${times(count)})`).join(", ")}${more}`}.`,
    running > 0 ? `${running === 1 ? "One completion runs" : `${running} completions run`} now; the steered ones go on unsteered from their next token.` : "No completion runs now.",
  ];
}

/** Of a default steering. */
export function touchedByDefault(counts: Counts): string[] {
  const all = asked(counts);
  if (all === 0) {
    return ["Nothing was asked in the last hour."];
  }
  const bare = Math.max(0, all - counts.steered);
  return [
    `In the last hour ${all === 1 ? "one request came" : `${all} requests came`}: ${bare} without steering, which would be steered then, and ${counts.steered} steered, on which it would act first.`,
  ];
}
