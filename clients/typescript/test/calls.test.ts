/** Every call of the client against the server's OpenAPI file: nothing is asked that it does not offer, and the other way. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { Client, type PatchCheckRequest } from "../src/index.js";

interface Operation {
  parameters?: { name: string; in: string }[];
}
const api = JSON.parse(readFileSync(new URL("../../../../docs/openapi.json", import.meta.url), "utf8")) as {
  paths: Record<string, Record<string, Operation>>;
};
// Pages for people and machines that no program calls through a client.
const NOT_CALLED = new Set(["GET /health", "GET /health/live", "GET /v1/spec/schema", "GET /v1/models/{name}"]);
// An earlier spelling of POST /v1/extract/{method}.
NOT_CALLED.add("POST /v1/extract");
// Always refused.
NOT_CALLED.add("POST /v1/embeddings");
// The form of another vendor, whose own client is used for it.
NOT_CALLED.add("POST /v1/messages").add("POST /v1/messages/count_tokens");
// The form of OpenAI, whose own client is used for it, and of vLLM, whose tools load adapters.
for (const path of ["/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content", "/v1/batches", "/v1/batches/{batch_id}"]) {
  NOT_CALLED.add(`GET ${path}`).add(`POST ${path}`).add(`DELETE ${path}`);
}
NOT_CALLED.add("POST /v1/batches/{batch_id}/cancel").add("POST /v1/load_lora_adapter").add("POST /v1/unload_lora_adapter");

const CHECK: PatchCheckRequest = {
  site: "mlp_act",
  layer: 1,
  artifact: "a",
  pairs: [{ base: "x", source: "y", base_answer: " a", source_answer: " b" }],
};

const CALLS: Record<string, (client: Client) => Promise<unknown>> = {
  models: (c) => c.models(),
  chat: (c) => c.chat("Hi", { model: "m" }),
  streamChat: async (c) => drained(c.streamChat("Hi", { model: "m" })),
  complete: (c) => c.complete("Hi", { model: "m" }),
  streamComplete: async (c) => drained(c.streamComplete("Hi", { model: "m" })),
  receipts: (c) => c.receipts({ limit: 3 }),
  receipt: (c) => c.receipt("req-1"),
  respond: (c) => c.respond("Hi", { model: "m" }),
  response: (c) => c.response("resp_1"),
  deleteResponse: (c) => c.deleteResponse("resp_1"),
  cancelResponse: (c) => c.cancelResponse("resp_1"),
  tokenize: (c) => c.tokenize("Hi"),
  tokenTexts: (c) => c.tokenTexts("Hi"),
  detokenize: (c) => c.detokenize([1]),
  version: (c) => c.version(),
  lens: (c) => c.lens("Hi", { model: "m" }),
  features: (c) => c.features("scope", "Hi", { model: "m" }),
  startCapture: (c) => c.startCapture(["Hi"], { resid_post: [1] }, { model: "m" }),
  capture: (c) => c.capture(["Hi"], { resid_post: [1] }, { model: "m" }),
  streamActivations: async (c) => drained(c.streamActivations("act-1")),
  importActivations: (c) => c.importActivations(new Uint8Array([1])),
  listActivations: (c) => c.listActivations(),
  getActivations: (c) => c.getActivations("act-1"),
  downloadActivations: (c) => c.downloadActivations("act-1"),
  deleteActivations: (c) => c.deleteActivations("act-1"),
  startPatchCheck: (c) => c.startPatchCheck(CHECK),
  checkPatch: (c) => c.checkPatch(CHECK),
  startSpecCheck: (c) => c.startSpecCheck({ steering: { preset: "p" } }),
  checkSpec: (c) => c.checkSpec({ steering: { preset: "p" } }),
  listArtifacts: (c) => c.listArtifacts({ q: "x", limit: 3 }),
  getArtifact: (c) => c.getArtifact("a@1"),
  artifactVersions: (c) => c.artifactVersions("a"),
  startPort: (c) => c.startPort("a@1", { name: "b", source: "act-1" }),
  port: (c) => c.port("a@1", { name: "b", source: "act-1" }),
  createArtifact: (c) => c.createArtifact({ name: "a" }, { 2: { vector: [1] } }),
  importArtifact: (c) => c.importArtifact(new Uint8Array([1])),
  downloadArtifact: (c) => c.downloadArtifact("a", { format: "gguf" }),
  patchArtifact: (c) => c.patchArtifact("a", { description: "d" }),
  deleteArtifact: (c) => c.deleteArtifact("a", true),
  setAlias: (c) => c.setAlias("a", "production", 1),
  removeAlias: (c) => c.removeAlias("a", "production"),
  listPresets: (c) => c.listPresets({ limit: 3 }),
  getPreset: (c) => c.getPreset("p"),
  presetVersions: (c) => c.presetVersions("p"),
  createPreset: (c) => c.createPreset("p", { interventions: [] }),
  deletePreset: (c) => c.deletePreset("p"),
  setPresetAlias: (c) => c.setPresetAlias("p", "production", 1),
  removePresetAlias: (c) => c.removePresetAlias("p", "production"),
  health: (c) => c.health(),
  metrics: (c) => c.metrics(),
  capabilities: (c) => c.capabilities(),
  effects: (c) => c.effects({ group: "arm", rollout: "ro-1", arm: "candidate" }),
  extractionMethods: (c) => c.extractionMethods(),
  startExtraction: (c) => c.startExtraction("mean-difference", { name: "a" }),
  extract: (c) => c.extract("mean_difference", { name: "a" }),
  startTuning: (c) => c.startTuning("a", { trial: { effort: "quick" } }),
  trialPicture: (c) => c.trialPicture("a", "png"),
  startCalibration: (c) => c.startCalibration("a", { prompts: ["x"] }),
  calibrate: (c) => c.calibrate("a", { prompts: ["x"] }),
  calibration: (c) => c.calibration("a"),
  calibrationPlot: (c) => c.calibrationPlot("a", "png"),
  startEvaluation: (c) => c.startEvaluation({ prompts: ["x"], graders: [{ kind: "whole" }], preset: "p" }),
  evaluate: (c) => c.evaluate({ prompts: ["x"], graders: [{ kind: "whole" }], preset: "p" }),
  evaluations: (c) => c.evaluations({ ref: "p@1" }),
  evaluation: (c) => c.evaluation("eval-1"),
  evaluationPage: (c) => c.evaluationPage("eval-1"),
  evaluationPicture: (c) => c.evaluationPicture("eval-1", "png"),
  deleteEvaluation: (c) => c.deleteEvaluation("eval-1"),
  history: (c) => c.history({ since: 0 }),
  live: async (c) => drained(c.live()),
  alerts: (c) => c.alerts(),
  jobs: (c) => c.jobs(),
  getJob: (c) => c.getJob("job-1"),
  cancelJob: (c) => c.cancelJob("job-1"),
  wait: (c) => c.wait("job-1"),
  defaultSpec: (c) => c.defaultSpec(),
  setDefaultSpec: (c) => c.setDefaultSpec({ preset: "p" }),
  clearDefaultSpec: (c) => c.clearDefaultSpec(),
  library: (c) => c.library(),
  collectLibrary: (c) => c.collectLibrary(),
  settings: (c) => c.settings(),
  reloadSettings: (c) => c.reloadSettings(),
  killSwitch: (c) => c.killSwitch(),
  setKillSwitch: (c) => c.setKillSwitch(true),
  ownKey: (c) => c.ownKey(),
  keys: (c) => c.keys(),
  getKey: (c) => c.getKey("k"),
  createKey: (c) => c.createKey({ name: "a", roles: ["infer"] }),
  changeKey: (c) => c.changeKey("k", { blocked: true }),
  rotateKey: (c) => c.rotateKey("k"),
  policies: (c) => c.policies(),
  setPolicy: (c) => c.setPolicy("team", { reports: false }),
  deletePolicy: (c) => c.deletePolicy("team", { key_id: "k" }),
  rollouts: (c) => c.rollouts({ limit: 3 }),
  getRollout: (c) => c.getRollout("ro-1"),
  createRollout: (c) => c.createRollout({ target: "p@production", candidate: 2, steps: [{ share: 0.1 }] }),
  publishRollout: (c) => c.publishRollout("ro-1"),
  promoteRollout: (c) => c.promoteRollout("ro-1"),
  returnRollout: (c) => c.returnRollout("ro-1", "why"),
  deleteRollout: (c) => c.deleteRollout("ro-1"),
  requirements: (c) => c.requirements(),
  setRequirement: (c) => c.setRequirement({ target: "p", bounds: [{ figure: "kl", at_most: 1 }] }),
  deleteRequirement: (c) => c.deleteRequirement({ target: "p", collection: "preset" }),
  audit: (c) => c.audit({ limit: 3 }),
  verifyAudit: (c) => c.verifyAudit(),
  deleteKey: (c) => c.deleteKey("k"),
};

test("every method of the client is in this table", () => {
  const methods = Object.getOwnPropertyNames(Client.prototype).filter((name) => name !== "constructor");
  assert.deepEqual(methods.sort(), Object.keys(CALLS).sort());
});

test("the Python client has the same methods", () => {
  const source = readFileSync(new URL("../../../python/trimtab_client/endpoints.py", import.meta.url), "utf8");
  const python = [...source.matchAll(/^ {4}(\w+) = (?:Stream)?Endpoint\(/gm)].map((found) => camel(found[1] ?? ""));
  assert.ok(python.length > 30);
  assert.deepEqual(python.sort(), Object.keys(CALLS).sort());
});

test("what the client asks is what the server offers, and all of it", async () => {
  const made = new Set<string>();
  for (const [name, call] of Object.entries(CALLS)) {
    const asked = await recorded(call);
    assert.ok(asked.length > 0, name);
    for (const { method, url } of asked) {
      const { operation, template } = find(method, url);
      made.add(`${method} ${template}`);
      const known = new Set((operation.parameters ?? []).filter((p) => p.in === "query").map((p) => p.name));
      for (const parameter of url.searchParams.keys()) {
        assert.ok(known.has(parameter), `${name} sends ${parameter}, which ${method} ${template} does not know`);
      }
    }
  }
  const offered = Object.entries(api.paths).flatMap(([path, operations]) =>
    Object.keys(operations).map((method) => `${method.toUpperCase()} ${path}`),
  );
  const left = offered.filter((operation) => !NOT_CALLED.has(operation) && !made.has(operation));
  assert.deepEqual(left, []);
});

/** The operation of a request. Of two templates that fit, the one with more literal segments is meant. */
function find(method: string, url: URL): { operation: Operation; template: string } {
  const fitting = Object.keys(api.paths)
    .filter((template) => new RegExp(`^${template.replace(/\./g, "\\.").replace(/\{\w+\}/g, "[^/]+?")}$`).test(url.pathname))
    .sort((a, b) => (a.match(/\{/g) ?? []).length - (b.match(/\{/g) ?? []).length);
  for (const template of fitting) {
    const operation = api.paths[template]?.[method.toLowerCase()];
    if (operation !== undefined) {
      return { operation, template };
    }
  }
  throw new assert.AssertionError({ message: `the server has no ${method} ${url.pathname}` });
}

async function recorded(call: (client: Client) => Promise<unknown>): Promise<{ method: string; url: URL }[]> {
  const asked: { method: string; url: URL }[] = [];
  const fetched: typeof fetch = async (input, init) => {
    asked.push({ method: init?.method ?? "GET", url: new URL(String(input)) });
    const asksStream = typeof init?.body === "string" && init.body.includes('"stream":true');
    const streamed = asksStream || String(input).endsWith("/v1/live");
    const body = streamed
      ? "data: [DONE]\n\n"
      : JSON.stringify({ id: "job-1", status: "succeeded", result: {}, data: [], deleted: [], tokens: [], token_strs: [] });
    return new Response(body);
  };
  await call(new Client({ fetch: fetched }));
  return asked;
}

async function drained(events: AsyncIterable<unknown>): Promise<void> {
  for await (const event of events) {
    assert.ok(event);
  }
}

function camel(name: string): string {
  return name.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase());
}
