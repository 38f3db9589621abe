/** Which figure of a token its colour shows. */

import type { Receipt } from "@trimtab/client";

export type PerToken = NonNullable<NonNullable<Receipt["effects"]>["choices"][number]["per_token"]>;
export type Heat = "effect" | "kl" | "surprise" | "rank" | "which";

export const HEATS: readonly [Heat, string][] = [
  ["effect", "how far, by which intervention"],
  ["kl", "how far it was moved (KL)"],
  ["surprise", "surprise to the untouched model"],
  ["rank", "rank in the untouched model"],
  ["which", "which intervention moved it most"],
];

/** Where a colour is full: a nat a token is a strong effect, five nats a word nobody expected, rank 100 far down the list. */
const FULL_KL = 1;
const FULL_SURPRISE = 5;
const FULL_RANK = 100;
/** Less than this moved a token by nothing that one should name an intervention for. */
const LEAST_KL = 0.01;

/** From 0 to 1. */
export function strengthOf(per: PerToken | null, i: number, by: Heat): number {
  if (per === null) {
    return 0;
  }
  const kl = per.kl[i] ?? 0;
  switch (by) {
    case "surprise":
      return Math.min((per.surprise[i] ?? 0) / FULL_SURPRISE, 1);
    case "rank":
      return Math.min(Math.log1p(per.rank[i] ?? 0) / Math.log1p(FULL_RANK), 1);
    case "which":
      return kl < LEAST_KL ? 0 : 1;
    default:
      return Math.min(kl / FULL_KL, 1);
  }
}

/** Of several interventions the one that moved a token most; 0 where there is one, or none is to be told apart. */
export function culpritOf(per: PerToken | null, i: number, by: Heat): number {
  const shares = (per?.interventions ?? []).map((one) => Math.abs(one[i] ?? 0));
  return shares.length < 2 || (by !== "effect" && by !== "which") ? 0 : shares.indexOf(Math.max(...shares));
}
