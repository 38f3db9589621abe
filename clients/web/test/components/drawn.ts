/** What components of the page find around them: a server that answers from a table. */

import { server } from "../../src/lib/server.svelte.js";

export const FINGERPRINT = "f";

/** Let the client's methods answer from `answers`; one that is not there fails the test that needs it. */
export function answering(answers: Record<string, (...given: never[]) => unknown>): void {
  server.standing = "ready";
  server.models = ["tiny", "tiny:warm"];
  server.capabilities = { model_name: "tiny", fingerprint: FINGERPRINT, vocab_size: 100, num_experts: 0, sites: {}, ops: {} } as never;
  server.own = { name: "ada", tenant: "default", roles: ["admin"], policies: [], limits: [] };
  server.client = new Proxy({} as never, {
    get: (_, name) => async (...given: never[]) => {
      const answer = answers[String(name)];
      if (answer === undefined) {
        throw new Error(`nothing answers ${String(name)}`);
      }
      return answer(...given);
    },
  });
}

export const artifact = (more: object = {}) => ({
  name: "calm", ref: "calm@1", version: 1, kind: "vector", op: "add", site: "resid_post", layers: [3], stored_layers: [2, 3], strength: { value: 2, unit: "raw" },
  options: {}, tags: [], aliases: [], description: "Calmer answers.", card: null, fingerprint: FINGERPRINT, residual_norm: {}, provenance: {}, created_at: "2026-01-01T00:00:00Z", nbytes: 10, model_id: null, ...more,
});

const point = (strength: number, kl: number, perplexity: number) => ({ strength, kl, perplexity, repetition: 0.02, kl_error: 0, compression: 1, length: 20, ended: 0.1, target: null });

export const calibration = {
  version: 1,
  settings: [
    {
      fingerprint: FINGERPRINT, layers: [3], prompts: 8, draws: 4,
      base: point(0, 0, 3), up: [point(1, 0.1, 3.1), point(2, 0.4, 5), point(4, 2, 40)], down: [point(1, 0.2, 3.2)],
      floor: [{ strength: 2, kl: { low: 0, median: 0.02, high: 0.1 }, perplexity: { low: 3, median: 3, high: 3 }, repetition: { low: 0, median: 0, high: 0 }, target: null }],
    },
  ],
};

export const receipt = {
  applied: [{ artifact: "calm@1", op: "add", layers: [3], sites: ["resid_post"], tokens: { prompt: 20, generation: 11 }, choices: [], source: "request", strength: { scale: { 3: 2 } }, options: {}, gate: null, card: true }],
  disabled: false, reason: null, engine: "scripted", presets: {}, report: "tokens", warnings: [],
  effects: {
    status: "measured",
    choices: [
      {
        index: 0, interventions: [{ shift: { kl: { mean: 0.42 } }, card_kl: 0.4 }], total: { kl: { mean: 0.42 }, top1_changed: 0.25 }, text: { repetition: 0.05 },
        per_token: { kl: [0.1, 2], surprise: [0.5, 4], rank: [0, 12], interventions: [[0.1, 2]] },
      },
    ],
  },
};
