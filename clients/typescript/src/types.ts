/**
 * Names for what the API takes and gives. All of them come from the server's OpenAPI file, generated twice: a field
 * with a default may be left out of a request, and is always there in an answer.
 */

import type { components as Answers } from "./answers.js";
import type { components as Requests, operations } from "./requests.js";

type Taken = Requests["schemas"];
type Given = Answers["schemas"];

export type Steering = Taken["Steering"];
export type Spec = Taken["Spec-Input"];
export type Contrast = Taken["Contrast"];
export type Intervention = Taken["Intervention-Input"];
export type Message = Taken["Message"];
export type ChatRequest = Taken["ChatRequest"];
export type CompletionRequest = Taken["CompletionRequest"];
export type ChatCompletion = Given["SteeredChatCompletion"];
export type TextCompletion = Given["SteeredCompletion"];
export type Receipt = Given["Receipt"];
export type ReceiptPage = Given["ReceiptList"];
export type ReceiptSummary = Given["ReceiptSummary"];
export type History = Given["HistoryView"];
export type Counts = Given["Counts"];
export type Bucket = Given["Bucket"];
/** What was counted since the event before; `at` in seconds since 1970. */
export type Now = Counts & { at: number };
export type Alerts = Given["AlertList"];
export type Alert = Given["AlertView"];
export type ResponsesRequest = Taken["ResponsesRequest"];
export type ModelResponse = Given["SteeredResponse"];
export type Usage = Given["CompletionUsage"];
export type LensRequest = Taken["LensRequest"];
export type LensReading = Given["LensReading"];
export type FeaturesRequest = Taken["FeaturesRequest"];
export type FeaturesReading = Given["FeaturesReading"];
export type CaptureRequest = Taken["CaptureBody"];
export type Activations = Given["Activations"];
export type PatchCheckRequest = Taken["PatchCheckBody"];
export type PortRequest = Taken["PortBody"];
export type StackCheckRequest = Taken["StackCheckBody"];
export type Artifact = Given["ArtifactView"];
export type ArtifactPage = Given["ArtifactList"];
export type Metadata = Taken["Metadata"];
export type ArtifactPatch = Taken["Patch"];
export type Preset = Given["PresetView"];
export type PresetPage = Given["PresetList"];
export type Job = Given["Job"];
export type CalibrateOptions = Taken["CalibrateOptions"];
export type TuneOptions = Taken["TuneRequest"];
export type Calibration = Given["Calibration"];
export type EvaluateOptions = Taken["EvaluateBody"];
export type Evaluation = Given["EvaluationReport"];
export type EvaluationSummary = Given["EvaluationSummary"];
export type KillSwitch = Given["KillSwitchView"];
export type NewKey = Taken["KeyBody"];
export type KeyChange = Taken["KeyChange"];
export type AccessKey = Given["KeyView"];
/** With the key itself, which the server does not show again. */
export type MadeKey = Given["NewKey"];
export type Policy = Taken["Policy-Input"];
export type TenantPolicy = Given["PolicyView"];
export type Rollout = Given["RolloutView"];
export type Requirement = Given["RequirementView"];
export type NewRequirement = Taken["Requirement"];
export type NewRollout = Taken["NewRollout"];
export type AuditPage = Given["AuditPage"];
export type AuditRecord = Given["AuditRecord"];
export type AuditVerdict = Given["AuditVerdict"];
export type OwnKey = Given["OwnKey"];
export type DefaultSpec = Given["DefaultSpecView"];
export type SettingsInForce = Given["SettingsView"];
export type ReloadedSettings = Given["ReloadedView"];
export type LibraryUsage = Given["LibraryView"];
export type Collected = Given["CollectedView"];

/** Query parameters of an operation. */
export type Query<Name extends keyof operations> = NonNullable<operations[Name]["parameters"]["query"]>;

/** A reference ("cheerful", "cheerful@3"), several, or the full `steering` object. */
export type Steer = string | readonly string[] | Steering;

/** Numbers of an artifact: layer, then the tensor's name, then nested lists. */
export type Tensors = Record<number, Record<string, unknown>>;

/** An extraction method. `data` names the field that takes the data, `request` is the JSON schema of all fields. */
export interface Method {
  name: string;
  summary: string;
  data: string;
  request: Record<string, unknown>;
}

/** Result of an extraction. `artifact` is the reference it was stored under. */
export interface Extracted {
  artifact: string;
  report: Record<string, unknown>;
}

/** What patching one part does, over all pairs. */
export interface PatchedPart {
  interchange: number;
  decrease: number;
  kl: number;
  moved: number;
}

/** Result of a check of a patch. */
export interface PatchCheck {
  verdict: "faithful" | "illusory" | "no_effect";
  rule: string;
  site: string;
  layer: number;
  readers: string[];
  rank: number;
  width: number;
  seen: number;
  row_norm: number;
  null_norm: number;
  pairs: number;
  dropped: number;
  clean: PatchedPart;
  full: PatchedPart;
  direction: PatchedPart;
  row: PatchedPart | null;
  null: PatchedPart | null;
  random: PatchedPart[];
  random_95: number;
  dormancy: number | null;
  dormancy_variance: number | null;
  warnings: string[];
}

export interface PortedLayer {
  source_layer: number;
  layer: number;
  method: "orthogonal" | "ridge" | "cca";
  explained: number;
  shuffled: number;
  coordinate: number;
  norm_ratio: number;
  tried: { layer: number; method: string; explained: number }[];
}

/** Result of porting an artifact. */
export interface Ported {
  artifact: string;
  source: string;
  source_model: string | null;
  source_fingerprint: string | null;
  site: string;
  layers: PortedLayer[];
  texts: number;
  held_out_texts: number;
  tokens: number;
  left_out: number;
  warnings: string[];
}

/** Where one intervention of a stack acts on what another left. */
export interface StackMeeting {
  site: string;
  layer: number;
  from_site: string;
  from_layer: number;
  tokens: number;
  kept: number | null;
  exchanged: number | null;
  order: number | null;
  cosine: number;
  overlap: number;
  shared: number[];
}

export interface StackPair {
  first: number;
  second: number;
  interference: number;
  correlation: number;
  measured: boolean;
  meetings: StackMeeting[];
}

export interface StackAdvice {
  finding: "idle" | "erased" | "reversed" | "together" | "against";
  interventions: number[];
  do: "reorder" | "drop" | "weaken" | "nothing";
  text: string;
  kl: number | null;
}

/** Result of a check of interventions that act together, in nats. */
export interface StackCheck {
  interventions: { op: string; artifact: string | null; sites: string[]; layers: number[]; origin: string; kl: number }[];
  pairs: StackPair[];
  sum_of_parts: number;
  predicted: number;
  interference: number;
  measured: number;
  measured_interference: number;
  advice: StackAdvice[];
  rule: string;
  texts: number;
  tokens: number;
}

/** Result of a calibration. `settings` are the curves, one entry a setting, as the artifact's card keeps them. */
export interface Calibrated {
  artifact: string;
  settings: Record<string, unknown>[];
}

export interface TokenLogprob {
  text: string;
  logprob: number | null;
  top: { text: string; logprob: number }[];
}

/** A piece of a stream. The last one carries the receipt. */
export interface Delta {
  text: string;
  index: number;
  /** The tokens of this piece with their likeliest alternatives, where log-probabilities were asked for. */
  tokens: TokenLogprob[];
  /** Ids of these tokens, and in the first piece those of the prompt, where `return_token_ids` asks for them. */
  ids: number[];
  promptIds: number[] | null;
  finishReason: string | null;
  usage: Usage | null;
  steering: Receipt | null;
}
