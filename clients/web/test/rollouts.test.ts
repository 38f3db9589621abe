import { describe, expect, it } from "vitest";

import { beside, limitWords, nearest, nextOf, railChoices, railName, railsOf, railValue, returnedByItself, shareOf, standingOf, stepsOf, stepWords } from "../src/lib/rollouts.js";
import { rail, rollout } from "./rolled.js";

describe("the next step of a roll-out", () => {
  it("begins once the present one has lasted and each rail has its samples of both arms", () => {
    const next = nextOf(rollout());
    expect(next?.what).toBe("step 2 of 2, 50 % of users");
    expect(next?.at?.toISOString()).toBe("2026-01-01T11:00:00.000Z");
    expect(next?.lacking).toEqual([{ name: "refusals", missing: 13 }]);
  });

  it("needs the samples anew in each step", () => {
    const second = rollout({ step: 1, rails: [rail({ stable_samples: 60, candidate_samples: 90 })] });
    expect(nextOf(second)?.lacking).toEqual([{ name: "refusals", missing: 40 }]);
  });

  it("does not wait in a shadow for what only users feel", () => {
    const steps = [{ share: 0, shadow: 0.2, wait_s: 60 }, { share: 1, shadow: 0, wait_s: 60 }];
    const rails = [rail({ rail: { metric: "latency", margin: 0.01, samples: 50, worse: "higher", grader: null, outcome: null, scale: null }, stable_samples: 0, candidate_samples: 0 })];
    expect(nextOf(rollout({ terms: { ...rollout().terms, steps }, rails }))?.lacking).toEqual([]);
    expect(nextOf(rollout({ step: 1, terms: { ...rollout().terms, steps }, rails }))?.lacking).toEqual([{ name: "seconds a token", missing: 50 }]);
  });

  it("after the last one is a person's or the server's", () => {
    expect(nextOf(rollout({ step: 1 }))).toMatchObject({ what: "somebody who puts it in production or returns it", at: null });
    expect(nextOf(rollout({ step: 1, terms: { ...rollout().terms, then: "promote" } }))?.what).toBe("production, by itself");
    for (const status of ["draft", "production", "returned"] as const) {
      expect(nextOf(rollout({ status }))).toBeNull();
    }
  });
});

describe("a roll-out in words", () => {
  it("says what share gets the candidate", () => {
    expect([rollout(), rollout({ step: 1 }), rollout({ status: "draft" }), rollout({ status: "returned" }), rollout({ status: "production" })].map(shareOf)).toEqual([0.05, 0.5, 0, 0, 1]);
    expect(stepWords({ share: 0, shadow: 0.2 })).toBe("20 % of prompts in shadow");
    expect(stepWords({ share: 0.05, shadow: 0.2 })).toBe("5.0 % of users, 20 % of prompts in shadow");
  });

  it("names rails, limits and values in their unit", () => {
    const dose = { ...rail().rail, metric: "dose" as const, margin: 0.1 };
    const outcome = { ...rail().rail, metric: "outcome" as const, grader: "refusal", outcome: "broken", worse: "lower" as const };
    expect([railName(dose), limitWords(dose), railValue(dose, 0.42)]).toEqual(["dose", "at most 0.10 nats more than stable", "0.42 nats"]);
    expect([railName(outcome), limitWords(outcome), railValue(outcome, null)]).toEqual(["broken by refusal", "at most 2.0 % less than stable", "–"]);
    expect(railValue({ ...dose, metric: "latency" }, 0.02)).toBe("20 ms");
  });

  it("tells a rail that is close only where it has its samples", () => {
    const seen = (evidence: number, samples = 50) => standingOf(rail({ evidence, stable_samples: samples, candidate_samples: samples }));
    expect([seen(-0.2), seen(0.74), seen(0.75), seen(1), seen(1.3, 49)]).toEqual(["fine", "fine", "close", "ends it", "needs samples"]);
    expect(nearest(rollout({ rails: [rail({ evidence: 0.1 }), rail({ evidence: 0.7 })] }))?.evidence).toBe(0.7);
    expect(nearest(rollout({ rails: [] }))).toBeNull();
  });

  it("knows who returned it", () => {
    const event = (by: string) => [{ at: "2026-01-01T10:00:00Z", what: "returned", by, tenant: "", why: "" }];
    expect(returnedByItself(rollout({ status: "returned", history: event("roll-out") }))).toBe(true);
    expect(returnedByItself(rollout({ status: "returned", history: event("ada") }))).toBe(false);
  });
});

describe("both arms side by side", () => {
  const effect = (arm: string, kl_mean: number) => ({ arm, completions: 4, kl_mean, kl_p95: 2, entropy_change: 0.1, top1_changed: 0.2, repetition: 0.05, length: 20 });
  const graded = (arm: string, shares: Record<string, number>) => ({ arm, grader: "refusal", answers: 8, shares });

  it("have one row for each figure, whichever arm came first", () => {
    const rows = beside([effect("candidate", 3), effect("stable", 1)], [graded("candidate", { answered: 0.5, refused: 0.5 }), graded("stable", { answered: 1 })]);
    const told = Object.fromEntries(rows.map((row) => [row.name, [row.stable, row.candidate]]));
    expect(told["Nats a token"]).toEqual([1, 3]);
    expect(told["answered, by refusal"]).toEqual([1, 0.5]);
    expect(told["refused, by refusal"]).toEqual([0, 0.5]);
  });

  it("leave out what was measured of none", () => {
    expect(beside([], [])).toEqual([]);
    expect(beside([effect("stable", 1)], [])[0]).toMatchObject({ stable: 4, candidate: null });
  });
});

describe("the form", () => {
  it("reads shares and margins as people write them", () => {
    expect(stepsOf("5, 50 100%", "0.5", "20")).toEqual([{ shadow: 0.2, wait_s: 1800 }, { share: 0.05, wait_s: 1800 }, { share: 0.5, wait_s: 1800 }, { share: 1, wait_s: 1800 }]);
    const rails = railsOf(railChoices().map((one) => ({ ...one, on: one.key === "latency" || one.key === "broken" })), "30");
    expect(rails).toEqual([
      { metric: "outcome", grader: "refusal", outcome: "broken", samples: 30, margin: 0.02 },
      { metric: "latency", samples: 30, margin: 0.01 },
    ]);
  });

  it.each([["", "1", "0"], ["five", "1", "0"], ["120", "1", "0"], ["5", "soon", "0"], ["5", "1", "101"], ["5", "-1", "0"]])("refuses %s, %s, %s", (shares, hours, shadow) => {
    expect(() => stepsOf(shares, hours, shadow)).toThrow();
  });

  it.each(["0", "1.5", "many"])("refuses %s samples", (samples) => {
    expect(() => railsOf(railChoices(), samples)).toThrow("is no number of samples");
  });
});
