/** Roll-outs in words and figures: where one stands, what leads on, how near its guard rails are to ending it. */

import type { NewRollout, Rollout } from "@trimtab/client";

import { nats, percent, short } from "./format.js";

export type RailView = Rollout["rails"][number];
export type Rail = RailView["rail"];
type Arm = "stable" | "candidate";

export const STANDS: Record<Rollout["status"], string> = { draft: "draft", published: "at work", production: "in production", returned: "returned" };

/** A rail whose evidence is as near to what ends a roll-out is shown as close. deploy/prometheus/alerts.yml has the same. */
export const CLOSE = 0.75;

/** Share of users that the candidate answers now. */
export function shareOf(rollout: Rollout): number {
  return rollout.status === "production" ? 1 : rollout.status === "published" ? stepOf(rollout).share : 0;
}

export function stepOf(rollout: Rollout): Rollout["terms"]["steps"][number] {
  const steps = rollout.terms.steps;
  return steps[Math.min(rollout.step, steps.length - 1)] as (typeof steps)[number];
}

/** "5 % of users", "20 % of prompts in shadow". */
export function stepWords(step: { share: number; shadow: number }): string {
  const parts = [];
  if (step.share > 0 || step.shadow === 0) {
    parts.push(`${percent(step.share)} of users`);
  }
  if (step.shadow > 0) {
    parts.push(`${percent(step.shadow)} of prompts in shadow`);
  }
  return parts.join(", ");
}

export interface Next {
  /** What comes next. */
  what: string;
  /** The earliest time of it, null where it waits for a person. */
  at: Date | null;
  /** Rails that have not the samples yet that it needs, with what is missing of the arm that has fewer. */
  lacking: { name: string; missing: number }[];
}

/** What a roll-out at work waits for; null of one that is not at work. */
export function nextOf(rollout: Rollout): Next | null {
  if (rollout.status !== "published") {
    return null;
  }
  const { steps, then } = rollout.terms;
  const at = new Date(new Date(rollout.step_since).getTime() + 1000 * stepOf(rollout).wait_s);
  const lacking = lackingOf(rollout);
  if (rollout.step < steps.length - 1) {
    return { what: `step ${rollout.step + 2} of ${steps.length}, ${stepWords(steps[rollout.step + 1] as (typeof steps)[number])}`, at, lacking };
  }
  return then === "promote" ? { what: "production, by itself", at, lacking } : { what: "somebody who puts it in production or returns it", at: null, lacking };
}

/** As the server counts: each rail needs its samples anew in every step in which it gets any. */
function lackingOf(rollout: Rollout): { name: string; missing: number }[] {
  const { steps, keys } = rollout.terms;
  const sampled = (rail: Rail, step: { share: number }) => rail.metric !== "latency" || step.share > 0 || keys.length > 0;
  return rollout.rails.flatMap((one) => {
    if (!sampled(one.rail, stepOf(rollout))) {
      return [];
    }
    const times = steps.slice(0, rollout.step + 1).filter((step) => sampled(one.rail, step)).length;
    const missing = one.rail.samples * times - Math.min(one.stable_samples, one.candidate_samples);
    return missing > 0 ? [{ name: railName(one.rail), missing }] : [];
  });
}

/** Who published it, and why it ended where it did. */
export function lastOf(rollout: Rollout, what: string): Rollout["history"][number] | null {
  return rollout.history.filter((one) => one.what === what).at(-1) ?? null;
}

/** Whether the server ended it, because of a guard rail. */
export function returnedByItself(rollout: Rollout): boolean {
  return rollout.status === "returned" && lastOf(rollout, "returned")?.by === "roll-out";
}

export function who(by: string): string {
  return by === "roll-out" ? "the roll-out itself" : by;
}

const NAMES: Record<Rail["metric"], string> = { dose: "dose", outcome: "outcome", refusals: "refusals", repetition: "repetition", latency: "seconds a token", errors: "errors" };

export function railName(rail: Rail): string {
  return rail.metric === "outcome" ? `${rail.outcome} by ${rail.grader}` : NAMES[rail.metric];
}

/** A value in the unit of the rail's metric. */
export function railValue(rail: Rail, value: number | null): string {
  return value === null ? "–" : rail.metric === "dose" ? nats(value) : rail.metric === "latency" ? `${short(1000 * value)} ms` : percent(value);
}

export function limitWords(rail: Rail): string {
  return `at most ${railValue(rail, rail.margin)} ${rail.worse === "higher" ? "more" : "less"} than stable`;
}

export type Standing = "ends it" | "close" | "needs samples" | "fine";

export function standingOf(one: RailView): Standing {
  if (Math.min(one.stable_samples, one.candidate_samples) < one.rail.samples) {
    return "needs samples";
  }
  return one.evidence >= 1 ? "ends it" : one.evidence >= CLOSE ? "close" : "fine";
}

/** The rail that is nearest to ending it; null without rails. */
export function nearest(rollout: Rollout): RailView | null {
  return rollout.rails.reduce<RailView | null>((worst, one) => (worst === null || one.evidence > worst.evidence ? one : worst), null);
}

interface Measured {
  arm?: string;
  completions: number;
  kl_mean: number;
  kl_p95: number;
  entropy_change: number;
  top1_changed: number;
  repetition: number;
  length?: number;
}
interface Graded {
  arm?: string;
  grader: string;
  answers: number;
  shares: Record<string, number>;
}
export interface Beside {
  name: string;
  stable: number | null;
  candidate: number | null;
  shown: (value: number) => string;
}

/** What was measured of both arms, figure by figure. */
export function beside(effects: readonly Measured[], outcomes: readonly Graded[]): Beside[] {
  const of = <T extends { arm?: string }>(rows: readonly T[], arm: Arm) => rows.find((row) => row.arm === arm);
  const figure = (name: string, key: keyof Omit<Measured, "arm">, shown: (value: number) => string): Beside => ({
    name, shown, stable: of(effects, "stable")?.[key] ?? null, candidate: of(effects, "candidate")?.[key] ?? null,
  });
  const rows = effects.length === 0 ? [] : [
    figure("Answers measured", "completions", String),
    figure("Nats a token", "kl_mean", short),
    figure("Nats a token, 95 %", "kl_p95", short),
    figure("Change of entropy", "entropy_change", short),
    figure("Likeliest token changed", "top1_changed", percent),
    figure("Repetition", "repetition", percent),
    figure("Tokens", "length", (value) => short(value)),
  ];
  for (const grader of [...new Set(outcomes.map((row) => row.grader))].sort()) {
    const graded = outcomes.filter((row) => row.grader === grader);
    rows.push({ name: `Answers graded by ${grader}`, shown: String, stable: of(graded, "stable")?.answers ?? null, candidate: of(graded, "candidate")?.answers ?? null });
    for (const outcome of [...new Set(graded.flatMap((row) => Object.keys(row.shares)))].sort()) {
      const share = (arm: Arm) => { const row = of(graded, arm); return row === undefined ? null : (row.shares[outcome] ?? 0); };
      rows.push({ name: `${outcome}, by ${grader}`, shown: percent, stable: share("stable"), candidate: share("candidate") });
    }
  }
  return rows;
}

/** What a form says of the guard rails: those that are chosen, each with its margin as people write it. */
export interface RailChoice {
  key: string;
  says: string;
  unit: string;
  /** From what people write to what the server takes. */
  scale: number;
  rail: Omit<NonNullable<NewRollout["rails"]>[number], "margin" | "samples">;
  on: boolean;
  margin: string;
}

export const railChoices = (): RailChoice[] => [
  { key: "errors", says: "Requests that fail", unit: "%", scale: 0.01, rail: { metric: "errors" }, on: true, margin: "0" },
  { key: "refusals", says: "Refused answers", unit: "%", scale: 0.01, rail: { metric: "refusals" }, on: true, margin: "2" },
  { key: "broken", says: "Broken answers", unit: "%", scale: 0.01, rail: { metric: "outcome", grader: "refusal", outcome: "broken" }, on: true, margin: "2" },
  { key: "dose", says: "Dose against the untouched model", unit: "nats", scale: 1, rail: { metric: "dose" }, on: false, margin: "0.1" },
  { key: "repetition", says: "Repeated 3-grams", unit: "%", scale: 0.01, rail: { metric: "repetition" }, on: false, margin: "5" },
  { key: "latency", says: "Time of a token", unit: "ms", scale: 0.001, rail: { metric: "latency" }, on: false, margin: "10" },
];

export class Unfit extends Error {}

function number(text: string, what: string): number {
  const value = Number(text.trim());
  if (text.trim() === "" || !Number.isFinite(value) || value < 0) {
    throw new Unfit(`“${text}” is no ${what}.`);
  }
  return value;
}

/** Steps as people write them: "5, 25, 100" are shares in percent, each of which lasts `hours` at least. */
export function stepsOf(shares: string, hours: string, shadow: string): NonNullable<NewRollout["steps"]> {
  const wait_s = Math.round(3600 * number(hours, "number of hours"));
  const found = shares.split(/[\s,;%]+/).filter(Boolean).map((one) => ({ share: number(one, "share") / 100, wait_s }));
  const first = number(shadow, "share");
  if (found.length === 0) {
    throw new Unfit("Write at least one share, 5 say.");
  }
  if (first > 100 || found.some((one) => one.share > 1)) {
    throw new Unfit("A share is 100 % at most.");
  }
  return first > 0 ? [{ shadow: first / 100, wait_s }, ...found] : found;
}

export function railsOf(choices: readonly RailChoice[], samples: string): NonNullable<NewRollout["rails"]> {
  const least = number(samples, "number of samples");
  if (!Number.isInteger(least) || least < 1) {
    throw new Unfit(`“${samples}” is no number of samples.`);
  }
  return choices.filter((one) => one.on).map((one) => ({ ...one.rail, samples: least, margin: number(one.margin, "margin") * one.scale }));
}
