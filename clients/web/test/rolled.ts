/** A roll-out at work, as the server tells it. */

import type { Rollout } from "@trimtab/client";

import type { RailView } from "../src/lib/rollouts.js";

export const rail = (more: object = {}): RailView => ({
  rail: { metric: "refusals", margin: 0.02, samples: 50, worse: "higher", grader: null, outcome: null, scale: null },
  stable_samples: 100, stable_mean: 0.05, candidate_samples: 37, candidate_mean: 0.2, evidence: 0.3, ...more,
});

export const rollout = (more: object = {}): Rollout => ({
  id: "ro-1", collection: "preset", target: "warm@production", stable: 1, candidate: 2, status: "published", step: 0, step_since: "2026-01-01T10:00:00Z", created_at: "2026-01-01T09:00:00Z",
  approved_by: "default/olga", problem: null, rails: [rail()],
  terms: { steps: [{ share: 0.05, shadow: 0, wait_s: 3600 }, { share: 0.5, shadow: 0, wait_s: 3600 }], keys: [], rails: [], alpha: 0.05, sample: 0.2, then: "hold" },
  history: [{ at: "2026-01-01T09:00:00Z", what: "created", by: "ada", tenant: "default", why: "" }, { at: "2026-01-01T10:00:00Z", what: "published", by: "olga", tenant: "default", why: "" }], ...more,
});
