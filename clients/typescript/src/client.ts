/** The client: one method per thing the server does. */

import { JobFailed } from "./errors.js";
import { Transport, type CallOptions, type ClientOptions } from "./transport.js";
import type {
  Artifact,
  ArtifactPage,
  ArtifactPatch,
  CalibrateOptions,
  Calibrated,
  Calibration,
  ChatCompletion,
  ChatRequest,
  AccessKey,
  Activations,
  AuditPage,
  AuditVerdict,
  CaptureRequest,
  Collected,
  CompletionRequest,
  DefaultSpec,
  Delta,
  EvaluateOptions,
  Evaluation,
  EvaluationSummary,
  Alerts,
  Extracted,
  History,
  Job,
  KeyChange,
  ReloadedSettings,
  SettingsInForce,
  KillSwitch,
  MadeKey,
  NewKey,
  OwnKey,
  FeaturesReading,
  FeaturesRequest,
  PatchCheck,
  PatchCheckRequest,
  Ported,
  PortRequest,
  LensReading,
  LensRequest,
  LibraryUsage,
  Message,
  Metadata,
  Method,
  NewRequirement,
  NewRollout,
  Now,
  Policy,
  Preset,
  PresetPage,
  Query,
  ModelResponse,
  Receipt,
  ReceiptPage,
  Requirement,
  ResponsesRequest,
  Rollout,
  Spec,
  StackCheck,
  StackCheckRequest,
  Steer,
  Steering,
  Tensors,
  TenantPolicy,
  TextCompletion,
  TokenLogprob,
  TuneOptions,
} from "./types.js";

const FIRST_PAUSE_MS = 50;
const LONGEST_PAUSE_MS = 1000;

type Fields<Body, Taken extends string> = Partial<Omit<Body, Taken | "steering" | "stream">> &
  CallOptions & { steering?: Steer };

/** Other fields of a chat request, `max_tokens` say. `model` is the server's base model if it is left out. */
export type ChatFields = Fields<ChatRequest, "messages">;
/** Other fields of a completion request. `model` is the server's base model if it is left out. */
export type CompletionFields = Fields<CompletionRequest, "prompt">;
/** Other fields of a response. `model` is the server's base model if it is left out. */
export type ResponseFields = Fields<ResponsesRequest, "input">;
/** Other fields of a reading. `model` is the server's base model if it is left out. */
export type LensFields = Fields<LensRequest, "input">;
export type FeaturesFields = Fields<FeaturesRequest, "artifact" | "input">;
export type CaptureFields = Fields<CaptureRequest, "input" | "sites">;

export interface WaitOptions extends CallOptions {
  onProgress?: (job: Job) => void;
}

export class Client {
  readonly #http: Transport;

  constructor(options: ClientOptions = {}) {
    this.#http = new Transport(options);
  }

  // Completions

  /** Names that can be asked for: the base model first, then one per preset. */
  async models(options: CallOptions = {}): Promise<string[]> {
    const list = await this.#http.json<{ data: { id: string }[] }>("GET", "/v1/models", options);
    return list.data.map((entry) => entry.id);
  }

  /** A chat completion. A string is a single message of the user. */
  async chat(messages: string | readonly Message[], fields: ChatFields = {}): Promise<ChatCompletion> {
    return this.#http.json("POST", "/v1/chat/completions", await this.#chatCall(messages, fields, false));
  }

  /** The same as `chat`, piece by piece; the last piece carries the receipt. */
  async *streamChat(messages: string | readonly Message[], fields: ChatFields = {}): AsyncGenerator<Delta, void, void> {
    const call = await this.#chatCall(messages, fields, true);
    for await (const event of this.#http.events("POST", "/v1/chat/completions", call)) {
      yield delta(event as Chunk);
    }
  }

  /** A continuation of plain text or token ids. */
  async complete(prompt: string | number[], fields: CompletionFields = {}): Promise<TextCompletion> {
    return this.#http.json("POST", "/v1/completions", await this.#call({ prompt }, fields));
  }

  /** The same as `complete`, piece by piece; the last piece carries the receipt. */
  async *streamComplete(prompt: string | number[], fields: CompletionFields = {}): AsyncGenerator<Delta, void, void> {
    const call = await this.#call({ prompt, stream: true }, fields);
    for await (const event of this.#http.events("POST", "/v1/completions", call)) {
      yield delta(event as Chunk);
    }
  }

  /** Lines of the receipts that are kept, newest first. */
  receipts(query: Query<"list_receipts"> = {}, options: CallOptions = {}): Promise<ReceiptPage> {
    return this.#http.json("GET", "/v1/receipts", { ...options, query });
  }

  /** The receipt of a finished request, by the id of its answer; kept for some minutes only. */
  receipt(request_id: string, options: CallOptions = {}): Promise<Receipt> {
    return this.#http.json("GET", "/v1/receipts/{request_id}", { ...options, path: { request_id } });
  }

  /** A turn of a conversation that the server may store; `previous_response_id` goes on from one. */
  async respond(input: ResponsesRequest["input"], fields: ResponseFields = {}): Promise<ModelResponse> {
    return this.#http.json("POST", "/v1/responses", await this.#call({ input }, fields));
  }

  /** A stored response. */
  response(response_id: string, options: CallOptions = {}): Promise<ModelResponse> {
    return this.#http.json("GET", "/v1/responses/{response_id}", { ...options, path: { response_id } });
  }

  async deleteResponse(response_id: string, options: CallOptions = {}): Promise<void> {
    await this.#http.send("DELETE", "/v1/responses/{response_id}", { ...options, path: { response_id } });
  }

  /** End a response that is being written. */
  cancelResponse(response_id: string, options: CallOptions = {}): Promise<ModelResponse> {
    return this.#http.json("POST", "/v1/responses/{response_id}/cancel", { ...options, path: { response_id } });
  }

  /** Tokens that a chat has with these messages, or that a completion has with `{ prompt }`. */
  async tokenize(text: string | readonly Message[] | { prompt: string }, options: CallOptions = {}): Promise<number[]> {
    return (await this.#http.json<{ tokens: number[] }>("POST", "/v1/tokenize", { ...options, json: asked(text) })).tokens;
  }

  /** The same with the text of each token, special ones by their name, and in a chat whose turn it is in. */
  async tokenTexts(
    text: string | readonly Message[] | { prompt: string },
    options: CallOptions = {},
  ): Promise<{ id: number; text: string; role: string | null }[]> {
    const call = { ...options, json: { ...asked(text), return_token_strs: true, return_token_roles: true } };
    const found = await this.#http.json<{ tokens: number[]; token_strs: string[]; token_roles?: string[] }>("POST", "/v1/tokenize", call);
    return found.tokens.map((id, i) => ({ id, text: found.token_strs[i] ?? "", role: found.token_roles?.[i] ?? null }));
  }

  /** The text of some tokens, special ones by their name. */
  async detokenize(tokens: readonly number[], options: CallOptions = {}): Promise<string> {
    const call = { ...options, json: { tokens } };
    return (await this.#http.json<{ prompt: string }>("POST", "/v1/detokenize", call)).prompt;
  }

  /** Which Trimtab the server is. */
  async version(options: CallOptions = {}): Promise<string> {
    return (await this.#http.json<{ version: string }>("GET", "/version", options)).version;
  }

  /** What each layer would say next, for text, token ids or messages. */
  async lens(input: LensRequest["input"], fields: LensFields = {}): Promise<LensReading> {
    return this.#http.json("POST", "/v1/lens", await this.#call({ input }, fields));
  }

  /** Which features of an SAE are active in text, token ids or messages. */
  async features(
    artifact: string,
    input: FeaturesRequest["input"],
    fields: FeaturesFields = {},
  ): Promise<FeaturesReading> {
    return this.#http.json("POST", "/v1/features", await this.#call({ artifact, input }, fields));
  }

  /** Begin to capture what the model holds inside while it reads texts. `sites`: layers by site, `{ resid_post: [3] }`. */
  async startCapture(input: CaptureRequest["input"], sites: CaptureRequest["sites"], fields: CaptureFields = {}): Promise<Job> {
    return this.#http.json("POST", "/v1/activations", await this.#call({ input, sites }, fields));
  }

  /** As `startCapture`, and wait for it. Throws JobFailed. */
  async capture(
    input: CaptureRequest["input"],
    sites: CaptureRequest["sites"],
    fields: CaptureFields & WaitOptions = {},
  ): Promise<Activations> {
    const { onProgress, ...rest } = fields;
    const job = await this.startCapture(input, sites, rest);
    const done = await this.wait(job.id, fields);
    return done.result as unknown as Activations;
  }

  /** Keep a file that another server captured; see `port`. */
  importActivations(file: Uint8Array | Blob, options: CallOptions = {}): Promise<Activations> {
    return this.#http.json("POST", "/v1/activations/import", { ...options, content: file });
  }

  /** Captured activations, newest first. */
  async listActivations(options: CallOptions = {}): Promise<Activations[]> {
    return (await this.#http.json<{ data: Activations[] }>("GET", "/v1/activations", options)).data;
  }

  getActivations(id: string, options: CallOptions = {}): Promise<Activations> {
    return this.#http.json("GET", "/v1/activations/{id}", { ...options, path: { id } });
  }

  /** The safetensors file: tensors `SITE.LAYER` of [rows, width], and int32 `text`, `position`, `token`. */
  downloadActivations(id: string, options: CallOptions = {}): Promise<Uint8Array> {
    return this.#http.bytes("GET", "/v1/activations/{id}/content", { ...options, path: { id } });
  }

  /** The same file in pieces, for one that does not fit into memory. */
  streamActivations(id: string, options: CallOptions = {}): AsyncGenerator<Uint8Array, void, void> {
    return this.#http.pieces("GET", "/v1/activations/{id}/content", { ...options, path: { id } });
  }

  async deleteActivations(id: string, options: CallOptions = {}): Promise<void> {
    await this.#http.send("DELETE", "/v1/activations/{id}", { ...options, path: { id } });
  }

  /** Begin to check whether a direction through which a patch works is one that the model itself uses. */
  startPatchCheck(body: PatchCheckRequest, options: CallOptions = {}): Promise<Job> {
    return this.#http.json("POST", "/v1/checks/patch", { ...options, json: body });
  }

  /** As `startPatchCheck`, and wait for it. Throws JobFailed. */
  async checkPatch(body: PatchCheckRequest, options: WaitOptions = {}): Promise<PatchCheck> {
    const job = await this.startPatchCheck(body, signalOf(options));
    return (await this.wait(job.id, options)).result as unknown as PatchCheck;
  }

  /** Begin to check what the interventions of a spec, its presets among them, do to each other. */
  startSpecCheck(body: StackCheckRequest, options: CallOptions = {}): Promise<Job> {
    return this.#http.json("POST", "/v1/specs/check", { ...options, json: body });
  }

  /** As `startSpecCheck`, and wait for it. Throws JobFailed. */
  async checkSpec(body: StackCheckRequest, options: WaitOptions = {}): Promise<StackCheck> {
    const job = await this.startSpecCheck(body, signalOf(options));
    return (await this.wait(job.id, options)).result as unknown as StackCheck;
  }

  // Artifacts

  /** One entry per name: the version that the bare name means. */
  listArtifacts(query: Query<"list_artifacts"> = {}, options: CallOptions = {}): Promise<ArtifactPage> {
    return this.#http.json("GET", "/v1/artifacts", { ...options, query });
  }

  /** `ref` is "name", "name@3" or "name@alias". */
  getArtifact(ref: string, options: CallOptions = {}): Promise<Artifact> {
    return this.#http.json("GET", "/v1/artifacts/{ref}", { ...options, path: { ref } });
  }

  /** All versions, newest first. */
  artifactVersions(name: string, options: CallOptions = {}): Promise<ArtifactPage> {
    return this.#http.json("GET", "/v1/artifacts/{name}/versions", { ...options, path: { name } });
  }

  /** Store numbers. */
  createArtifact(metadata: Partial<Metadata>, tensors: Tensors, options: CallOptions = {}): Promise<Artifact> {
    return this.#http.json("POST", "/v1/artifacts", { ...options, json: { metadata, tensors } });
  }

  /**
   * Take in a safetensors, GGUF or npz file; fields of `metadata` win over those in the file. Of an SAE of another program
   * the JSON beside it and its conventions stand under `sae`.
   */
  importArtifact(
    file: Uint8Array | Blob,
    metadata?: Partial<Metadata> & { sae?: Record<string, unknown> },
    options: CallOptions = {},
  ): Promise<Artifact> {
    const query = metadata === undefined ? {} : { metadata: JSON.stringify(metadata) };
    return this.#http.json("POST", "/v1/artifacts/import", { ...options, content: file, query });
  }

  /** The file, as safetensors unless `query.format` says otherwise. */
  downloadArtifact(ref: string, query: Query<"download_artifact"> = {}, options: CallOptions = {}): Promise<Uint8Array> {
    return this.#http.bytes("GET", "/v1/artifacts/{ref}/download", { ...options, path: { ref }, query });
  }

  /**
   * Begin to port an artifact of another checkpoint to the served model. `source` of the body: id of activations of the
   * artifact's own model, of whole texts, as `importActivations` gives one.
   */
  startPort(ref: string, body: PortRequest, options: CallOptions = {}): Promise<Job> {
    return this.#http.json("POST", "/v1/artifacts/{ref}/port", { ...options, path: { ref }, json: body });
  }

  /** As `startPort`, and wait for it. Throws JobFailed. */
  async port(ref: string, body: PortRequest, options: WaitOptions = {}): Promise<Ported> {
    const job = await this.startPort(ref, body, signalOf(options));
    return (await this.wait(job.id, options)).result as unknown as Ported;
  }

  /** Change what describes one version; fields that are left out stay as they are. */
  patchArtifact(ref: string, fields: Partial<ArtifactPatch>, options: CallOptions = {}): Promise<Artifact> {
    return this.#http.json("PATCH", "/v1/artifacts/{ref}", { ...options, path: { ref }, json: fields });
  }

  /** Delete one version, or with a bare name all; gives their references. `force` also deletes what is in use. */
  async deleteArtifact(ref: string, force = false, options: CallOptions = {}): Promise<string[]> {
    const call = { ...options, path: { ref }, query: { force } };
    return (await this.#http.json<{ deleted: string[] }>("DELETE", "/v1/artifacts/{ref}", call)).deleted;
  }

  /** Point an alias of an artifact at a version. */
  setAlias(name: string, alias: string, version: number, options: CallOptions = {}): Promise<Artifact> {
    const call = { ...options, path: { name, alias }, json: { version } };
    return this.#http.json("PUT", "/v1/artifacts/{name}/aliases/{alias}", call);
  }

  async removeAlias(name: string, alias: string, options: CallOptions = {}): Promise<void> {
    await this.#http.send("DELETE", "/v1/artifacts/{name}/aliases/{alias}", { ...options, path: { name, alias } });
  }

  // Presets

  /** One entry per name: the version that the bare name means. */
  listPresets(query: Query<"list_presets"> = {}, options: CallOptions = {}): Promise<PresetPage> {
    return this.#http.json("GET", "/v1/presets", { ...options, query });
  }

  getPreset(ref: string, options: CallOptions = {}): Promise<Preset> {
    return this.#http.json("GET", "/v1/presets/{ref}", { ...options, path: { ref } });
  }

  /** All versions, newest first. */
  presetVersions(name: string, options: CallOptions = {}): Promise<PresetPage> {
    return this.#http.json("GET", "/v1/presets/{name}/versions", { ...options, path: { name } });
  }

  /** Store a spec as a new version. */
  createPreset(name: string, spec: Spec, description = "", options: CallOptions = {}): Promise<Preset> {
    return this.#http.json("POST", "/v1/presets", { ...options, json: { name, spec, description } });
  }

  /** Delete one version, or with a bare name all; gives their references. */
  async deletePreset(ref: string, force = false, options: CallOptions = {}): Promise<string[]> {
    const call = { ...options, path: { ref }, query: { force } };
    return (await this.#http.json<{ deleted: string[] }>("DELETE", "/v1/presets/{ref}", call)).deleted;
  }

  /** Point an alias of a preset at a version. */
  setPresetAlias(name: string, alias: string, version: number, options: CallOptions = {}): Promise<Preset> {
    const call = { ...options, path: { name, alias }, json: { version } };
    return this.#http.json("PUT", "/v1/presets/{name}/aliases/{alias}", call);
  }

  async removePresetAlias(name: string, alias: string, options: CallOptions = {}): Promise<void> {
    await this.#http.send("DELETE", "/v1/presets/{name}/aliases/{alias}", { ...options, path: { name, alias } });
  }

  // What the server offers

  /** Resolves if the server can serve requests. */
  async health(options: CallOptions = {}): Promise<void> {
    await this.#http.send("GET", "/health/ready", options);
  }

  /** Counters and gauges in Prometheus' text format. */
  async metrics(options: CallOptions = {}): Promise<string> {
    return (await this.#http.send("GET", "/metrics", options)).text();
  }

  /** Sites and ops that the loaded model offers, proven when the server started, and limits. */
  capabilities(options: CallOptions = {}): Promise<Record<string, unknown>> {
    return this.#http.json("GET", "/v1/capabilities", options);
  }

  /** What steering did, from the server's store, in rows as `query.group` asks. */
  effects(query: Query<"list_effects"> = {}, options: CallOptions = {}): Promise<Record<string, unknown>> {
    return this.#http.json("GET", "/v1/effects", { ...options, query });
  }

  /** What was counted, in buckets: traffic, latency, load, refusals. */
  history(query: Query<"show_history"> = {}, options: CallOptions = {}): Promise<History> {
    return this.#http.json("GET", "/v1/history", { ...options, query });
  }

  /** The same as it happens, every few seconds, until the iteration is left. */
  async *live(options: CallOptions = {}): AsyncGenerator<Now, void, void> {
    for await (const event of this.#http.events("GET", "/v1/live", options)) {
      yield event as Now;
    }
  }

  /** What stands out now, what fires first. */
  alerts(options: CallOptions = {}): Promise<Alerts> {
    return this.#http.json("GET", "/v1/alerts", options);
  }

  // Making artifacts

  /** Every extraction method of the server, with what it takes. */
  async extractionMethods(options: CallOptions = {}): Promise<Method[]> {
    return (await this.#http.json<{ data: Method[] }>("GET", "/v1/extract/methods", options)).data;
  }

  /** Begin to make an artifact; `fields` are those of the method's schema, the data among them. */
  startExtraction(method: string, fields: { name: string } & Record<string, unknown>, options: CallOptions = {}): Promise<Job> {
    const call = { ...options, path: { method: method.replaceAll("-", "_") }, json: fields };
    return this.#http.json("POST", "/v1/extract/{method}", call);
  }

  /** As `startExtraction`, and wait for it. Throws JobFailed. */
  async extract(method: string, fields: { name: string } & Record<string, unknown>, options: WaitOptions = {}): Promise<Extracted> {
    const job = await this.startExtraction(method, fields, signalOf(options));
    return (await this.wait(job.id, options)).result as unknown as Extracted;
  }

  /** Begin to choose layers and strength of a stored vector anew, by what the model writes. */
  startTuning(ref: string, settings: TuneOptions, options: CallOptions = {}): Promise<Job> {
    return this.#http.json("POST", "/v1/artifacts/{ref}/tune", { ...options, path: { ref }, json: settings });
  }

  /** What the trial of a vector found, as a picture. */
  trialPicture(ref: string, format: "png" | "svg" = "svg", options: CallOptions = {}): Promise<Uint8Array> {
    return this.#http.bytes("GET", "/v1/artifacts/{ref}/trial.{format}", { ...options, path: { ref, format } });
  }

  /** Begin to measure what an artifact does at which strength. */
  startCalibration(ref: string, settings: CalibrateOptions, options: CallOptions = {}): Promise<Job> {
    return this.#http.json("POST", "/v1/artifacts/{ref}/calibrate", { ...options, path: { ref }, json: settings });
  }

  /** As `startCalibration`, and wait for it. Throws JobFailed. */
  async calibrate(ref: string, settings: CalibrateOptions, options: WaitOptions = {}): Promise<Calibrated> {
    const job = await this.startCalibration(ref, settings, signalOf(options));
    return (await this.wait(job.id, options)).result as unknown as Calibrated;
  }

  /** The measured curves, one entry per setting. */
  calibration(ref: string, options: CallOptions = {}): Promise<Calibration> {
    return this.#http.json("GET", "/v1/artifacts/{ref}/calibration", { ...options, path: { ref } });
  }

  /** A picture of one setting's curve. */
  calibrationPlot(ref: string, format: "png" | "svg" = "svg", setting = 0, options: CallOptions = {}): Promise<Uint8Array> {
    const call = { ...options, path: { ref, format }, query: { setting } };
    return this.#http.bytes("GET", "/v1/artifacts/{ref}/calibration.{format}", call);
  }

  /** Begin to grade what the model writes under a spec or preset, beside the untouched model and random artifacts. */
  startEvaluation(settings: EvaluateOptions, options: CallOptions = {}): Promise<Job> {
    return this.#http.json("POST", "/v1/evaluations", { ...options, json: settings });
  }

  /** As `startEvaluation`, and wait for it: the whole report. Throws JobFailed. */
  async evaluate(settings: EvaluateOptions, options: WaitOptions = {}): Promise<Evaluation> {
    const job = await this.startEvaluation(settings, signalOf(options));
    const done = await this.wait(job.id, options);
    return this.evaluation(String(done.result?.["id"]), signalOf(options));
  }

  /** Summaries, newest first; of one artifact or preset version where `ref` names it. */
  async evaluations(query: Query<"list_evaluations"> = {}, options: CallOptions = {}): Promise<EvaluationSummary[]> {
    const call = { ...options, query };
    return (await this.#http.json<{ data: EvaluationSummary[] }>("GET", "/v1/evaluations", call)).data;
  }

  /** One report, with texts. */
  evaluation(id: string, options: CallOptions = {}): Promise<Evaluation> {
    return this.#http.json("GET", "/v1/evaluations/{id}", { ...options, path: { id } });
  }

  /** One report as an HTML page to read. */
  evaluationPage(id: string, options: CallOptions = {}): Promise<Uint8Array> {
    return this.#http.bytes("GET", "/v1/evaluations/{id}/report", { ...options, path: { id } });
  }

  /** Shares at every dose, beside those of random artifacts, as a picture. */
  evaluationPicture(id: string, format: "png" | "svg" = "svg", options: CallOptions = {}): Promise<Uint8Array> {
    return this.#http.bytes("GET", "/v1/evaluations/{id}/picture.{format}", { ...options, path: { id, format } });
  }

  async deleteEvaluation(id: string, options: CallOptions = {}): Promise<void> {
    await this.#http.send("DELETE", "/v1/evaluations/{id}", { ...options, path: { id } });
  }

  // Jobs

  async jobs(options: CallOptions = {}): Promise<Job[]> {
    return (await this.#http.json<{ data: Job[] }>("GET", "/v1/jobs", options)).data;
  }

  getJob(id: string, options: CallOptions = {}): Promise<Job> {
    return this.#http.json("GET", "/v1/jobs/{id}", { ...options, path: { id } });
  }

  /** Ask a job to stop. */
  cancelJob(id: string, options: CallOptions = {}): Promise<Job> {
    return this.#http.json("POST", "/v1/jobs/{id}/cancel", { ...options, path: { id } });
  }

  /** Wait until a job has succeeded. Throws JobFailed if it fails or is cancelled. */
  async wait(id: string, options: WaitOptions = {}): Promise<Job> {
    for (let pause = FIRST_PAUSE_MS; ; pause = Math.min(2 * pause, LONGEST_PAUSE_MS)) {
      const job = await this.getJob(id, signalOf(options));
      options.onProgress?.(job);
      if (job.status === "succeeded") {
        return job;
      }
      if (job.status === "failed" || job.status === "cancelled") {
        const error = (job.error ?? {}) as { message?: string; code?: string; param?: string };
        throw new JobFailed(error.message ?? `the job was ${job.status}`, id, error.code ?? null, error.param ?? null);
      }
      await sleep(pause, options.signal);
    }
  }

  // Switches

  /** The spec that acts first in every request that does not say otherwise. */
  defaultSpec(options: CallOptions = {}): Promise<DefaultSpec> {
    return this.#http.json("GET", "/v1/admin/default-spec", options);
  }

  setDefaultSpec(spec: Spec | { preset: string }, options: CallOptions = {}): Promise<DefaultSpec> {
    return this.#http.json("PUT", "/v1/admin/default-spec", { ...options, json: spec });
  }

  clearDefaultSpec(options: CallOptions = {}): Promise<DefaultSpec> {
    return this.#http.json("DELETE", "/v1/admin/default-spec", options);
  }

  /** What the library holds, and its limits. */
  library(options: CallOptions = {}): Promise<LibraryUsage> {
    return this.#http.json("GET", "/v1/admin/library", options);
  }

  /** Remove from the storage what deleted versions and crashes left, if at least so old. */
  collectLibrary(minAgeS = 3600, options: CallOptions = {}): Promise<Collected> {
    return this.#http.json("POST", "/v1/admin/library/gc", { ...options, query: { min_age_s: minAgeS } });
  }

  /** What the server was started with, and the versions of what runs; without secrets. */
  settings(options: CallOptions = {}): Promise<SettingsInForce> {
    return this.#http.json("GET", "/v1/admin/settings", options);
  }

  /** Have the server read its file with settings and its secrets again, and take over what it can. */
  reloadSettings(options: CallOptions = {}): Promise<ReloadedSettings> {
    return this.#http.json("POST", "/v1/admin/settings/reload", options);
  }

  killSwitch(options: CallOptions = {}): Promise<KillSwitch> {
    return this.#http.json("GET", "/v1/admin/kill-switch", options);
  }

  /** True turns all steering off until it is turned off again. */
  setKillSwitch(on: boolean, options: CallOptions = {}): Promise<KillSwitch> {
    return this.#http.json("PUT", "/v1/admin/kill-switch", { ...options, json: { on } });
  }

  /** What the key of this client may do. */
  ownKey(options: CallOptions = {}): Promise<OwnKey> {
    return this.#http.json("GET", "/v1/key", options);
  }

  /** All keys, oldest first, without their secrets. */
  async keys(options: CallOptions = {}): Promise<AccessKey[]> {
    return (await this.#http.json<{ data: AccessKey[] }>("GET", "/v1/admin/keys", options)).data;
  }

  getKey(id: string, options: CallOptions = {}): Promise<AccessKey> {
    return this.#http.json("GET", "/v1/admin/keys/{id}", { ...options, path: { id } });
  }

  /** Make a key. Its `key` is shown this once. */
  createKey(key: NewKey, options: CallOptions = {}): Promise<MadeKey> {
    return this.#http.json("POST", "/v1/admin/keys", { ...options, json: key });
  }

  /** Block a key, change its roles or its expiry; null takes the expiry away. */
  changeKey(id: string, change: KeyChange, options: CallOptions = {}): Promise<AccessKey> {
    return this.#http.json("PATCH", "/v1/admin/keys/{id}", { ...options, path: { id }, json: change });
  }

  /** Give a key another secret; the present one counts for `overlapS` longer. */
  rotateKey(id: string, overlapS = 3600, options: CallOptions = {}): Promise<MadeKey> {
    const json = { overlap_s: overlapS };
    return this.#http.json("POST", "/v1/admin/keys/{id}/rotate", { ...options, path: { id }, json });
  }

  async deleteKey(id: string, options: CallOptions = {}): Promise<void> {
    await this.#http.send("DELETE", "/v1/admin/keys/{id}", { ...options, path: { id } });
  }

  /** What the requests of tenants and keys may ask of steering. */
  async policies(options: CallOptions = {}): Promise<TenantPolicy[]> {
    return (await this.#http.json<{ data: TenantPolicy[] }>("GET", "/v1/admin/policies", options)).data;
  }

  /** Set all rules of a policy, of one key where `query` names it. */
  setPolicy(tenant: string, policy: Policy, query: Query<"set_policy"> = {}, options: CallOptions = {}): Promise<TenantPolicy> {
    const call = { ...options, path: { tenant }, query, json: policy };
    return this.#http.json("PUT", "/v1/admin/policies/{tenant}", call);
  }

  async deletePolicy(tenant: string, query: Query<"delete_policy"> = {}, options: CallOptions = {}): Promise<void> {
    await this.#http.send("DELETE", "/v1/admin/policies/{tenant}", { ...options, path: { tenant }, query });
  }

  /** Roll-outs of presets and artifacts, the newest first. */
  async rollouts(query: Query<"list_rollouts"> = {}, options: CallOptions = {}): Promise<Rollout[]> {
    return (await this.#http.json<{ data: Rollout[] }>("GET", "/v1/admin/rollouts", { ...options, query })).data;
  }

  getRollout(id: string, options: CallOptions = {}): Promise<Rollout> {
    return this.#http.json("GET", "/v1/admin/rollouts/{id}", { ...options, path: { id } });
  }

  /** Make a draft, which acts on nothing until it is published. */
  createRollout(rollout: NewRollout, options: CallOptions = {}): Promise<Rollout> {
    return this.#http.json("POST", "/v1/admin/rollouts", { ...options, json: rollout });
  }

  /** Approve a draft: it acts on requests from now on. */
  publishRollout(id: string, options: CallOptions = {}): Promise<Rollout> {
    return this.#http.json("POST", "/v1/admin/rollouts/{id}/publish", { ...options, path: { id } });
  }

  /** Point the alias at the candidate, which ends the roll-out. */
  promoteRollout(id: string, options: CallOptions = {}): Promise<Rollout> {
    return this.#http.json("POST", "/v1/admin/rollouts/{id}/promote", { ...options, path: { id } });
  }

  /** Let only the stable version act again, which ends the roll-out. */
  returnRollout(id: string, why = "", options: CallOptions = {}): Promise<Rollout> {
    return this.#http.json("POST", "/v1/admin/rollouts/{id}/return", { ...options, path: { id }, json: { why } });
  }

  async deleteRollout(id: string, options: CallOptions = {}): Promise<void> {
    await this.#http.send("DELETE", "/v1/admin/rollouts/{id}", { ...options, path: { id } });
  }

  /** What aliases require of a version before it may be moved there. */
  async requirements(options: CallOptions = {}): Promise<Requirement[]> {
    return (await this.#http.json<{ data: Requirement[] }>("GET", "/v1/admin/requirements", options)).data;
  }

  setRequirement(requirement: NewRequirement, options: CallOptions = {}): Promise<Requirement> {
    return this.#http.json("PUT", "/v1/admin/requirements", { ...options, json: requirement });
  }

  async deleteRequirement(query: Query<"delete_requirement">, options: CallOptions = {}): Promise<void> {
    await this.#http.send("DELETE", "/v1/admin/requirements", { ...options, query });
  }

  /** Records of the audit, the newest first; the oldest first where `after` says behind which number. */
  audit(query: Query<"list_audit"> = {}, options: CallOptions = {}): Promise<AuditPage> {
    return this.#http.json("GET", "/v1/audit", { ...options, query });
  }

  /** Have the server check the whole chain; `number` and `digest` are of a record that has to be there still. */
  verifyAudit(query: Query<"verify_audit"> = {}, options: CallOptions = {}): Promise<AuditVerdict> {
    return this.#http.json("GET", "/v1/audit/verify", { ...options, query });
  }

  #chatCall(messages: string | readonly Message[], fields: ChatFields, stream: boolean) {
    const given = typeof messages === "string" ? [{ role: "user", content: messages }] : messages;
    return this.#call(stream ? { messages: given, stream } : { messages: given }, fields);
  }

  async #call(body: object, fields: CallOptions & { steering?: Steer; model?: string }) {
    const { signal, steering, model, ...rest } = fields;
    const options = signalOf({ signal });
    const wanted = steering === undefined ? {} : { steering: steeringField(steering) };
    return { ...options, json: { model: model ?? (await this.models(options))[0], ...body, ...wanted, ...rest } };
  }
}

/** The `steering` object for what the methods take. */
export function steeringField(steering: Steer): Steering {
  if (typeof steering === "object" && !Array.isArray(steering)) {
    return steering as Steering;
  }
  const names = typeof steering === "string" ? [steering] : (steering as readonly string[]);
  return { interventions: names.map((artifact) => ({ artifact })) } as Steering;
}

function asked(text: string | readonly Message[] | { prompt: string }): object {
  if (typeof text === "object" && "prompt" in text) {
    return text;
  }
  return { messages: typeof text === "string" ? [{ role: "user", content: text }] : text };
}

interface ChatLogprob {
  token: string;
  logprob: number;
  top_logprobs?: { token: string; logprob: number }[];
}

interface Logprobs {
  /** Of a chat. */
  content?: ChatLogprob[] | null;
  /** Of a plain completion. */
  tokens?: string[] | null;
  token_logprobs?: (number | null)[] | null;
  top_logprobs?: Record<string, number>[] | null;
}

interface Chunk {
  choices: {
    index: number;
    text?: string;
    delta?: { content?: string | null };
    finish_reason?: string | null;
    logprobs?: Logprobs | null;
    token_ids?: number[] | null;
    prompt_token_ids?: number[] | null;
  }[];
  prompt_token_ids?: number[] | null;
  usage?: Delta["usage"];
  steering?: Delta["steering"];
}

function delta(chunk: Chunk): Delta {
  const choice = chunk.choices[0];
  return {
    text: choice?.text ?? choice?.delta?.content ?? "",
    index: choice?.index ?? 0,
    tokens: tokensOf(choice?.logprobs),
    ids: choice?.token_ids ?? [],
    promptIds: chunk.prompt_token_ids ?? choice?.prompt_token_ids ?? null,
    finishReason: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
    steering: chunk.steering ?? null,
  };
}

function tokensOf(found: Logprobs | null | undefined): TokenLogprob[] {
  if (found?.content) {
    return found.content.map((one) => ({
      text: one.token,
      logprob: one.logprob,
      top: (one.top_logprobs ?? []).map((other) => ({ text: other.token, logprob: other.logprob })),
    }));
  }
  return (found?.tokens ?? []).map((text, i) => ({
    text,
    logprob: found?.token_logprobs?.[i] ?? null,
    top: Object.entries(found?.top_logprobs?.[i] ?? {}).map(([other, logprob]) => ({ text: other, logprob })),
  }));
}

function signalOf(options: { signal?: AbortSignal | undefined }): CallOptions {
  return options.signal === undefined ? {} : { signal: options.signal };
}

function sleep(milliseconds: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    if (signal?.aborted) {
      stop();
    } else {
      signal?.addEventListener("abort", stop, { once: true });
    }
  });
}
