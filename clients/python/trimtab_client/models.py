"""What the server answers. Fields that a newer server adds are kept and reachable as attributes."""

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class Model(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class TokenCounts(Model):
    prompt: int
    generation: int


class Applied(Model):
    """One intervention as it acted.

    card: digest of the artifact's card as it was read; another one beside the same reference says that it was changed.
    strength["scale"]: the factor on the stored numbers, per layer. gate: its condition; choices[i]["gate"] says whether
    it was open, and the scores.
    """

    artifact: str
    card: str | None = None
    source: str
    op: str
    sites: list[str]
    layers: list[int]
    strength: dict[str, Any]
    tokens: TokenCounts
    gate: dict[str, Any] | None = None
    choices: list[dict[str, Any]] = []


class Receipt(Model):
    """What was done to the model for a response.

    disabled: the kill switch held all steering back. effects: what it did, measured, if `report` asked for it.
    outcomes: what the answers were by graders, with the report "outcome". monitor: per probe of `monitor` its scores
    per token. guard_checks: per choice, how often its guards were checked; applied[j].choices[i]["guard"] says what
    they did. switched_off: per choice, the generated token from which on nothing was steered, as the kill switch was
    turned on meanwhile. warnings: what was asked for and is rarely meant, with a "code", the index of the
    "intervention" and a "message". rollouts: the arms of roll-outs that the request belongs to. contrast: the "weak"
    run, written as `applied` is, with "alpha" and "beta", where tokens were chosen by the difference between two.
    """

    applied: list[Applied]
    disabled: bool
    reason: str | None = None
    engine: str
    effects: dict[str, Any] | None = None
    outcomes: dict[str, Any] | None = None
    monitor: list[dict[str, Any]] = []
    guard_checks: list[int | None] = []
    switched_off: list[int | None] = []
    warnings: list[dict[str, Any]] = []
    rollouts: list[dict[str, Any]] = []
    contrast: dict[str, Any] | None = None


class Usage(Model):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(Model):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class Completion(Model):
    """A chat or plain completion; both have the same shape here."""

    id: str
    model: str
    choices: list[Choice]
    usage: Usage
    steering: Receipt

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text


class Delta(Model):
    """A piece of a stream. The last one carries the receipt."""

    text: str = ""
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    steering: Receipt | None = None


class LensReading(Model):
    """What each layer would say next. layers: per layer its number and per position the top tokens and groups."""

    model: str
    lens: str
    tokens: int
    layers: list[dict[str, Any]]
    first_tokens: dict[str, dict[str, str]] = {}
    steering: Receipt


class FeaturesReading(Model):
    """Which features of an SAE are active in a text. top: the strongest over all tokens that were looked at. positions:
    per token how many are active, the strongest, and those that were asked for."""

    model: str
    artifact: str
    site: str
    layer: int
    tokens: int
    explained: float | None
    top: list[dict[str, Any]]
    positions: list[dict[str, Any]]
    steering: Receipt


class Activations(Model):
    """Captured activations. rows: of every tensor of the file. sites: layers by site."""

    id: str
    created_at: int
    expires_at: int
    model: str
    fingerprint: str
    texts: int
    tokens: int
    rows: int
    sites: dict[str, list[int]]
    pool: str
    dtype: str
    bytes: int
    applied: list[str] = []
    disabled: str | None = None


class PatchCheck(Model):
    """What a check of a patch found. Of each part that was patched: interchange, decrease, kl, moved."""

    verdict: str
    rule: str
    site: str
    layer: int
    readers: list[str]
    rank: int
    width: int
    seen: int
    row_norm: float
    null_norm: float
    pairs: int
    dropped: int
    clean: dict[str, float]
    full: dict[str, float]
    direction: dict[str, float]
    row: dict[str, float] | None = None
    null: dict[str, float] | None = None
    random: list[dict[str, float]]
    random_95: float
    dormancy: float | None = None
    dormancy_variance: float | None = None
    warnings: list[str] = []


class StackCheck(Model):
    """What a check of interventions that act together found, in nats. Of each intervention: op, artifact, kl alone; of
    each pair: interference, correlation and where one acts on what the other left; what to do about it: advice."""

    interventions: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    sum_of_parts: float
    predicted: float
    interference: float
    measured: float
    measured_interference: float
    advice: list[dict[str, Any]]
    rule: str
    texts: int
    tokens: int


class Ported(Model):
    """What porting an artifact found. Of each layer: source_layer, layer, method, explained (share of the variance of
    texts held out), shuffled, coordinate, norm_ratio, tried."""

    artifact: str
    source: str
    source_model: str | None = None
    source_fingerprint: str | None = None
    site: str
    layers: list[dict[str, Any]]
    texts: int
    held_out_texts: int
    tokens: int
    left_out: int
    warnings: list[str] = []


class Artifact(Model):
    """One version in the library, without its numbers."""

    name: str
    ref: str
    version: int
    kind: str
    op: str | None
    site: str
    layers: Any = None
    strength: dict[str, Any]
    description: str = ""
    tags: list[str] = []
    model_id: str | None = None
    fingerprint: str | None = None
    digest: str
    nbytes: int
    stored_layers: list[int]
    aliases: list[str]
    provenance: dict[str, Any] = {}
    card: dict[str, Any] | None = None
    created_at: datetime


class Preset(Model):
    """One version of a stored spec. model: the name that serves it."""

    name: str
    ref: str
    version: int
    model: str
    spec: dict[str, Any]
    description: str = ""
    aliases: list[str]
    created_at: datetime


class Page(Model, Generic[T]):
    """cursor: pass it to fetch the next page; None on the last."""

    data: list[T]
    cursor: str | None = None


class Behind(Model):
    """The job before one that waits. about: what it works on."""

    id: str
    kind: str
    about: str = ""


class Job(Model):
    """about: what it works on. estimate_s: seconds it will take once it runs. progress: 0 to 1. place: in the queue, 0
    having the turn; behind: the job before it. result: of a job that succeeded; error: of one that failed.
    """

    id: str
    kind: str
    about: str = ""
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    estimate_s: float | None = None
    progress: float = 0.0
    stage: str = ""
    place: int | None = None
    behind: Behind | None = None
    created_at: float | None = None
    finished_at: float | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")


class Extracted(Model):
    """Result of an extraction. artifact: the reference it was stored under."""

    artifact: str
    report: dict[str, Any]


class Calibrated(Model):
    """Result of a calibration. settings: the curves, one entry a setting, as the artifact's card keeps them."""

    artifact: str
    settings: list[dict[str, Any]]


class Method(Model):
    """An extraction method. data: the field that takes the data. request: JSON schema of all fields."""

    name: str
    summary: str
    data: str
    request: dict[str, Any]


class Setting(Model):
    """A setting in force. Passwords and keys are hidden. reloaded: a new value holds without a restart."""

    name: str
    value: Any
    default: bool
    reloaded: bool = False
    description: str


class SettingsInForce(Model):
    settings: list[Setting]
    versions: dict[str, str]


class ReloadedSettings(Model):
    """changed: settings, and what holds from now on. needs_restart: those whose new value holds only after a start."""

    changed: dict[str, Any]
    needs_restart: list[str]
    certificates: bool


class Turned(Model):
    """Who turned a switch last. by: the name of a key; "owner" is that of the settings, and where none is asked for."""

    at: datetime
    by: str
    tenant: str


class KillSwitch(Model):
    on: bool
    reason: str | None = None
    stored: bool = True
    failure: str | None = None
    turned: Turned | None = None


class DefaultSpec(Model):
    spec: dict[str, Any] | None = Field(default=None)
    turned: Turned | None = None


class LibraryUsage(Model):
    """What the library holds; max_*: its limits, None for none."""

    names: int
    versions: int
    bytes: int
    max_names: int | None = None
    max_versions: int | None = None
    max_bytes: int | None = None


class AccessKey(Model):
    """A key without its secret. former_until: until when the secret before the last rotation counts."""

    id: str
    name: str
    tenant: str
    roles: list[str]
    created_at: datetime
    expires_at: datetime | None = None
    blocked: bool = False
    used_at: datetime | None = None
    former_until: datetime | None = None


class NewAccessKey(AccessKey):
    """key: as it is sent; the server does not show it again."""

    key: str


class Limit(Model):
    """A limit on what may be used, of the tenant or the key, and what is used of it. reset_s: seconds until it begins
    anew."""

    of: str
    limit: str
    most: int
    used: int
    reset_s: float


class OwnKey(Model):
    """policies: all of which hold, each with whose it is."""

    name: str
    tenant: str
    roles: list[str]
    policies: list[dict[str, Any]] = []
    limits: list[Limit] = []


class TenantPolicy(Model):
    """key_id: None where it holds for all keys of the tenant. policy: its rules; what is left out does not hold."""

    tenant: str
    key_id: str | None = None
    policy: dict[str, Any]
    updated_at: datetime


class Requirement(Model):
    """What an alias requires of a version before it may be moved there. bounds: each with `figure`, `grader`,
    `at_least` and `at_most`."""

    collection: str
    target: str
    bounds: list[dict[str, Any]]
    prompts: int
    max_age_s: float | None = None
    tenant: str | None = None
    updated_at: datetime


class RailState(Model):
    """A guard rail as it was stated, and what it has seen. evidence: against the candidate, over what ends the roll-out
    at 1."""

    rail: dict[str, Any]
    stable_samples: int
    stable_mean: float | None = None
    candidate_samples: int
    candidate_mean: float | None = None
    evidence: float


class Rollout(Model):
    """A candidate version beside the stable one. status: draft, published, production or returned. approved_by: who
    published it. history: what became of it, oldest first, each with `at`, `what`, `by`, `tenant` and `why`."""

    id: str
    collection: str
    target: str
    stable: int
    candidate: int
    status: str
    step: int
    step_since: datetime
    created_at: datetime
    approved_by: str | None = None
    terms: dict[str, Any]
    rails: list[RailState]
    problem: str | None = None
    history: list[dict[str, Any]]


class AuditRecord(Model):
    """A change: who made it, from where, with what it was before and after. digest: of all other fields."""

    number: int
    at: datetime
    action: str
    target: str
    before: Any = None
    after: Any = None
    key_id: str | None = None
    key_name: str
    tenant: str
    address: str
    request_id: str
    previous: str
    digest: str


class AuditHead(Model):
    number: int
    digest: str


class AuditPage(Model):
    """head: the newest record of all."""

    data: list[AuditRecord]
    head: AuditHead


class AuditVerdict(Model):
    """What a check of the chain found. fault: None where it is whole."""

    whole: bool
    fault: str | None = None
    records: int
    first: int | None = None
    last: int | None = None
    head: str


class Collected(Model):
    """What a collection removed: unused numbers, files of killed writers, bytes of both."""

    blobs: int
    partial: int
    bytes: int
