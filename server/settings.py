"""Settings of the server: one table. Each can be set as an environment variable with the prefix TRIMTAB_, or in a file.
"""

import ipaddress
import os
import re
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from platformdirs import user_cache_path
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from server.errors import InvalidSettings
from server.settings_file import VARIABLE, FileSettings, SecretFiles
from steering.language.errors import InvalidSpec, path_text
from steering.language.fields import PART_PATTERN
from steering.language.spec import MAX_GRADERS, AskedGrader, Spec
from steering.language.vocabulary import SITES, Site

MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$"

# Without the colon that comes before a preset.
ADAPTER_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$"

# As browsers write it: no path, no slash at the end, the name in lower case.
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+")


class Settings(BaseSettings):
    """What the server is started with."""

    model_config = SettingsConfigDict(env_prefix="TRIMTAB_", extra="forbid", frozen=True, protected_namespaces=())

    config: Path | None = Field(default=None, description="File with any of the other settings, in YAML, or in TOML if "
        "it ends in .toml; options and environment variables win. Where a setting has `_file` behind its name, its "
        "value is in that file (relative to this one); TRIMTAB_API_KEY_FILE and the like do the same.")
    model: str = Field(default="lab/models/lab-dense", min_length=1,
        description="Model to load: smollm2, a GGUF file, a folder in Hugging Face form or a Hugging Face id.")
    served_model_name: str | None = Field(default=None, pattern=MODEL_NAME_PATTERN,
        description="Name in the API; by default the last part of `model`.")
    served_model_aliases: tuple[str, ...] = Field(default=(), max_length=64, description="Further names (JSON list) "
        "under which the same model may be asked. Policies, metrics and receipts know it by the first name alone.")
    engine: Literal["transformers", "vllm"] = Field(default="transformers",
        description="transformers: the model in this process. vllm: stock vLLM, compiled, in processes of its own.")
    generation_config: Literal["auto", "none"] = Field(default="auto",
        description="What a request gets that leaves temperature, top_p, top_k, min_p or repetition_penalty out. auto: "
        "what the model's generation_config.json says; none: the defaults of the API, whatever the model.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto",
        description="Where the model runs; vLLM has what its build is for.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(default="auto",
        description="Number format of the weights; auto: float32 on a CPU, else the checkpoint's.")

    host: str = Field(default="127.0.0.1", description="Interface to listen on. Any but loopback needs `api_key`.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port.")
    api_key: SecretStr | None = Field(default=None, description="Key that requests must carry as a bearer token.")
    oidc_issuer: str | None = Field(default=None, min_length=1, max_length=2048, description="OpenID provider whose "
        "tokens (JWT) count beside keys: its name, as `iss` in its tokens. Needs `oidc_audience`.")
    oidc_audience: str | None = Field(default=None, min_length=1, max_length=2048, description="What its tokens must "
        "be for: this server, as `aud` in them.")
    oidc_jwks_url: str | None = Field(default=None, max_length=2048, description="Where its keys are; by default where "
        "its discovery document says.")
    oidc_tenant_claim: str = Field(default="tenant", min_length=1, max_length=256, description="Claim that names the "
        "tenant; `a.b` is b inside of a.")
    oidc_tenant: str | None = Field(default=None, pattern=PART_PATTERN, description="Tenant of tokens without that "
        "claim; by default they are refused.")
    oidc_roles_claim: str = Field(default="roles", min_length=1, max_length=256, description="Claim with the roles: a "
        "list, or words in a text.")
    oidc_roles: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="What the values of that claim "
        'mean here (JSON): {"ml-users": ["infer"]}. By default they are the names of roles, and others mean nothing.')
    allowed_hosts: tuple[str, ...] = Field(default=(), description="Further names (JSON list) under which a server "
        "without a key may be asked, and whose web pages may ask it. Loopback names and `host` always may.")

    cors_origins: tuple[str, ...] = Field(default=(), description="Origins (JSON list) of other sites whose pages may "
        'ask this server from a browser, such as "https://app.example"; "*": any, which needs `api_key`.')

    tls_certificate: Path | None = Field(default=None, description="File with the server's certificate and those above "
        "it, in PEM; with it the server speaks HTTPS alone. It is read again when the settings are.")
    tls_key: Path | None = Field(default=None, description="File with the key of this certificate; by default it is "
        "in the same file.")
    tls_key_password: SecretStr | None = Field(default=None, description="Password of this key.")
    tls_client_ca: Path | None = Field(default=None, description="File with the authorities, in PEM, one of which must "
        "have signed the certificate of each client; without it clients need none.")

    data_dir: Path = Field(default=Path("data"), description="Folder for the library, jobs and the server's own state.")
    cache_dir: Path | None = Field(default=None, description="Folder for models that were fetched or converted; by "
                                   "default `trimtab` in the user's cache folder (XDG_CACHE_HOME, ~/.cache).")
    database_url: str | None = Field(default=None,
        description="SQLAlchemy URL of the library; by default SQLite in `data_dir`. Replicas share one, "
        "postgresql://USER@HOST/NAME say.")
    database_connections: int = Field(default=10, ge=2, le=1000, description="Connections to it that one server may "
        "have, where it is not SQLite.")
    database_wait_s: float = Field(default=10.0, ge=0.1, le=600,
        description="Seconds a request waits for the library's database while another writer holds it.")
    blob_url: str | None = Field(default=None,
        description="fsspec URL of the blobs; by default a folder in `data_dir`.")

    slots: int | None = Field(default=None, ge=1, le=4096,
        description="Distinct programs that can be resident at once; by default `max_requests`, what a batch can hold.")
    slot_wait_s: float = Field(default=600.0, ge=0, le=86400,
        description="Seconds a request whose spec has no slot waits its turn before it gets a 503, if its own time is "
        "not over before.")
    slot_queue: int = Field(default=1024, ge=0, le=2**16,
        description="Requests that may wait for a slot; one more gets a 503 at once.")
    max_batch_tokens: int = Field(default=512, ge=16, le=2**20, description="Tokens a step processes at most.")
    max_requests: int = Field(default=128, ge=1, le=4096, description="Completions in one batch; more wait their turn.")
    kv_cache_tokens: int = Field(default=32768, ge=64,
        description="Tokens the key-value cache holds, for all requests together.")
    engine_stall_s: float = Field(default=60.0, ge=1, le=86400,
        description="Seconds that work may wait without a step or measuring pass that ends before the engine is taken "
        "to hang; longer than the longest of them.")
    engine_restart_limit: int = Field(default=6, ge=0, le=1000,
        description="Starts of the engine in a row that may fail, or not last, before /health/live says that only a "
        "new process helps. It is tried on all the same.")
    vllm_sites: tuple[Site, ...] = Field(default=SITES, min_length=1,
        description="Sites that are hooked in vLLM's model; others are refused.")
    vllm_graph_sites: tuple[Site, ...] = Field(default=("resid_post",),
        description="Hooked sites whose simple programs vLLM's compiled graph carries out by itself; the rest goes "
        "through an opaque op, at a cost only where it is used.")
    vllm_graph_ops: Literal["auto", "vectors", "all"] = Field(default="auto",
        description="What is simple: `vectors` (added vectors and masks) or `all` (norm options, directions and sign "
        "flips too). `auto`: vectors on a CPU, all on a GPU.")
    vllm_rows: int = Field(default=8192, ge=16, le=2**20, description="Vectors of one width the graph's pool holds; a "
                           "program that finds no room there goes through the opaque op.")
    vllm_depth: int = Field(default=1, ge=1, le=8, description="Stages of a stack at one place in the graph.")
    vllm_rank: int = Field(default=2, ge=2, le=16, description="Directions of one stage in the graph.")
    vllm_eager: bool = Field(default=False, description="Run vLLM without its compiled graph.")
    vllm_start_s: float = Field(default=1800.0, ge=0, le=86400,
        description="Seconds that a start of vLLM may take, with loading, compiling and the test of every hooked "
        "place, before it is ended; 0: any number.")
    vllm_adapters: dict[str, str] = Field(default_factory=dict, description="LoRA adapters (JSON, name to folder) that "
        "are loaded at the start; requests name one as `model`.")
    vllm_adapter_dir: Path | None = Field(default=None, description="Folder below which further ones may be loaded "
        "while the server runs, by POST /v1/load_lora_adapter.")
    vllm_adapters_at_once: int = Field(default=4, ge=1, le=256, description="Adapters in one batch; requests with more "
                                       "of them wait.")
    vllm_adapter_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(default=16, description="Largest rank of an "
                                                                          "adapter; each takes memory for it.")
    vllm_args: dict[str, Any] = Field(default_factory=dict, description="Further arguments of vLLM's AsyncEngineArgs "
                                      "(JSON), such as tensor_parallel_size or distributed_executor_backend.")
    quota_store_url: SecretStr | None = Field(default=None, description="Redis in which several servers count quotas "
        "together (redis://, rediss://, redis+unix://); by default each counts by itself.")
    quota_store_timeout_s: float = Field(default=0.25, gt=0, le=10, description="Seconds a request waits for that "
        "Redis at most; then this server counts by itself for a while.")
    share_prefix_cache: bool = Field(default=False, description="Let tenants reuse each other's cached prefixes, which "
        "lets one tell by the time of its answer what another has asked. Off: each has its own.")
    queue_requests: int = Field(default=1024, ge=4, le=2**20,
        description="Requests that may wait in front of the engine; more get a 503. One client may be three quarters "
        "of them.")
    queue_tokens: int = Field(default=2**20, ge=1024,
        description="Tokens that may wait in front of the engine: prompts, and what each completion is likely to "
        "generate (512 at most).")
    request_timeout_s: float = Field(default=600.0, ge=0, le=86400,
        description="Seconds a completion request may take in all; 0: any number. `timeout_s` of a request can only "
        "lower it.")
    max_choices: int = Field(default=16, ge=1, le=1024, description="Largest n, completions per prompt.")
    max_prompts: int = Field(default=64, ge=1, le=4096, description="Prompts in one /v1/completions request.")
    max_output_tokens: int | None = Field(default=None, ge=1,
        description="Tokens one completion may have; by default what the context leaves.")
    control_in_messages: bool = Field(default=False,
        description="Take control tokens that a chat message holds for what they stand for, so that a message can end "
        "its turn and open others. Off: they are text like any other.")
    tool_parser: Literal["auto", "none", "hermes", "llama3_json", "mistral", "pythonic"] = Field(default="auto",
        description="Form in which the model writes tool calls; auto: what its chat template shows.")
    reasoning_parser: Literal["auto", "none", "think", "mistral"] = Field(default="auto",
        description="Marks around what the model thinks: `<think>` or `[THINK]`; auto: what its chat template shows.")
    max_grammar_bytes: int = Field(default=128 * 2**10, ge=1024, le=2**24, description="Characters that a JSON schema, "
        "pattern or grammar that an answer is held to may have.")
    grammar_s: float = Field(default=10.0, gt=0, le=600, description="Seconds one of these may take to compile.")
    grammar_cache_bytes: int = Field(default=64 * 2**20, ge=0, le=2**36, description="Memory for compiled ones that "
        "the embedded engine keeps for reuse.")
    max_header_bytes: int = Field(default=16 * 2**10, ge=1024, le=2**20,
        description="Bytes of a request's address and headers.")
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024,
        description="Bytes of a JSON body. More numbers than fit are uploaded as a file.")
    max_upload_bytes: int = Field(default=256 * 2**20, ge=1024, description="Bytes of an uploaded artifact file.")
    body_timeout_s: float = Field(default=30.0, gt=0, le=3600, description="Seconds in which a body must arrive; for "
                                  "a large one a second more per 16 KiB.")
    header_timeout_s: float = Field(default=10.0, gt=0, le=3600,
        description="Seconds in which a connection must send the head of its request.")
    keep_alive_s: float = Field(default=15.0, ge=0, le=3600, description="Seconds after which a stream that has "
        "nothing to say yet sends a comment line, so that proxies keep it open. A stream whose first token takes "
        "longer begins with status 200, and what fails then is its last event. 0: never.")
    stalled_client_s: float = Field(default=30.0, gt=0, le=3600, description="Seconds a client may leave what was "
        "sent to it unread; then its connection is ended and its request cancelled.")
    max_connections: int = Field(default=1024, ge=1, le=2**16, description="Connections open at once; more get a 503. "
        "Fewer where the system's limit of open files (`ulimit -n`) leaves fewer.")
    shutdown_s: float = Field(default=20.0, ge=0, le=86400, description="Seconds that open requests have to finish "
        "once the server is told to stop (SIGTERM, SIGINT); then streams end with an error, the rest get a 503.")
    max_inline_bytes: int = Field(default=4 * 2**20, ge=0,
        description="Bytes the numbers written inline in one spec may take.")
    library_bytes: int = Field(default=64 * 2**30, ge=0, description="Bytes the library may hold, numbers and metadata "
                               "of all versions; 0: no limit.")
    library_names: int = Field(default=10_000, ge=0,
        description="Artifacts and presets the library may hold; 0: no limit.")
    library_versions: int = Field(default=100_000, ge=0,
        description="Versions of them the library may hold; 0: no limit.")
    gc_interval_s: float = Field(default=3600.0, ge=0, le=10**7, description="Seconds between two collections of what "
                                 "deleted versions and crashes left on the disk; 0: only when asked for.")
    judge_urls: tuple[str, ...] = Field(default=(), description="URLs (JSON list) at and below which evaluations may "
        "ask another model to judge texts; prompts and answers are sent there.")
    max_jobs: int = Field(default=16, ge=1, le=1024, description="Background jobs that may wait or run at once; as "
        "many batches may, too.")
    program_cache_bytes: int = Field(default=256 * 2**20, ge=0,
        description="Memory for compiled programs kept for reuse.")

    max_program_numbers: int = Field(default=2**25, ge=1024, le=2**32, description="Numbers one program may have "
        "at all its layers together. A step reads them once, however many tokens it touches; each touched token costs "
        "two operations a number, as it does for each weight of the model; and each takes 4 bytes in a slot.")
    step_limit: float = Field(default=10_000.0, ge=0, le=1e30, description="Largest relative step: how far an "
        "intervention may move a token's activation, in multiples of its own norm. 0: no limit.")
    step_limit_action: Literal["refuse", "clip"] = Field(default="refuse", description="refuse: a request with a "
        "larger step fails; clip: the step is shortened to the limit, and the receipt says so.")

    shadow_sample: float = Field(default=0.05, ge=0, le=1, description="Share of steered completions whose effect is "
                                 "measured without being asked for.")
    shadow_budget: float = Field(default=0.05, ge=0, le=10, description="Tokens of such measurements, as a share "
                                 "of the tokens served.")
    effects_kept_bytes: int = Field(default=2**28, ge=0, le=2**40, description="Bytes that completions whose effect "
        "will be measured may keep of their own passes, all together; one that finds no room is run again for it.")
    effects_database_url: str | None = Field(default=None, description="SQLAlchemy URL of measured effects; by "
        "default that of the library, in a schema of its own, or SQLite in `data_dir` where that is SQLite.")

    rollout_two_people: bool = Field(default=False, description="Whether a roll-out is published with another key than "
                                     "the one that made it.")
    outcome_sample: float = Field(default=0.05, ge=0, le=1, description="Share of answers, steered or not, that are "
        "graded without being asked for; 0: none.")
    outcome_graders: tuple[AskedGrader, ...] = Field(default=("refusal",), max_length=MAX_GRADERS,
        description='What grades them (JSON list): "refusal", "language=fr" or a grader as an object. Not a judge and '
        "not a probe, because both take more than the answer's text.")

    history_kept_s: float = Field(default=28 * 86400.0, ge=0, le=10**8, description="Seconds for which counts of "
        "traffic, latency and alerts are kept, by the minute for two days and by the hour after that; 0: not at all.")
    history_database_url: str | None = Field(default=None, description="SQLAlchemy URL of these counts; by default "
        "as `effects_database_url`.")
    receipts_kept_s: float = Field(default=900.0, ge=0, le=86400, description="Seconds for which receipts can be "
        "had from /v1/receipts after the end of their requests; 0: not at all.")
    receipts_kept_bytes: int = Field(default=16 * 2**20, ge=0, le=2**36, description="Bytes that such receipts may "
        "take in memory; the oldest make room first, and one that takes more than a quarter of it is not kept.")
    responses_kept_s: float = Field(default=86400.0, ge=0, le=10**8, description="Seconds for which responses "
        "of /v1/responses are stored, with the conversation behind them; 0: not at all.")
    responses_kept_bytes: int = Field(default=2**28, ge=0, le=2**40, description="Bytes that stored responses may "
        "take; the oldest make room.")
    responses_database_url: str | None = Field(default=None, description="SQLAlchemy URL of stored responses; by "
        "default as `effects_database_url`.")
    files_bytes: int = Field(default=2**30, ge=0, le=2**44, description="Bytes that files of /v1/files may take; an "
        "upload that is over them is refused. Results of batches never are, and count.")
    files_kept_s: float = Field(default=30 * 86400.0, gt=0, le=10**9, description="Seconds for which files are kept.")
    activations_bytes: int = Field(default=10 * 2**30, ge=0, le=2**50, description="Bytes that captured activations "
        "may take in `data_dir`; a capture that would be over them is refused.")
    activations_kept_s: float = Field(default=86400.0, gt=0, le=10**9,
        description="Seconds for which captured activations are kept at most.")
    batch_lines: int = Field(default=50_000, ge=1, le=10**7, description="Requests that one batch may have.")
    batch_at_once: int = Field(default=4, ge=1, le=1024, description="Requests of a batch under way at once. They get "
        "places in the engine only where no other request waits for one.")
    require_steering: bool = Field(default=False, description="Refuse completion requests to which nothing would be "
        "applied, because a gateway in between may have dropped their `steering` field. While the kill switch is on "
        "requests are served unsteered all the same.")
    default_spec: Spec | None = Field(default=None,
        description="Spec (JSON) that acts on every request as long as the admin API has set no other.")
    kill_switch: bool = Field(default=False,
        description="Start with all steering off. While this is set the admin API cannot turn it on.")
    kill_switch_running: Literal["unsteered", "end"] = Field(default="unsteered",
        description="What steered completions do that run when the kill switch is turned on: go on unsteered from the "
        "next token, or end there. Those that the engine cannot go on with end.")
    audit_kept_s: float = Field(default=0.0, ge=0, le=10**10, description="Seconds for which records of the audit are "
        "kept; 0: for ever. The oldest go at the passes of gc_interval_s, and the chain says that they did.")
    audit_steering_sample: float = Field(default=0.0, ge=0, le=1, description="Share of the steered requests of which "
        "the audit records who steered whom with what.")
    audit_texts: bool = Field(default=False, description="Record prompt and answer of these requests as well, "
        "without what audit_redact matches. Without this no text of a request is stored in the audit.")
    audit_redact: tuple[str, ...] = Field(default=(r"[\w.+-]+@[\w-]+\.[\w.-]+", r"(?:\d[ -]?){12,18}\d"),
        description="Regular expressions (JSON list) of what is replaced in recorded texts; by default mail addresses "
        "and numbers of cards and accounts.")
    trace_endpoint: str | None = Field(default=None, pattern=r"^https?://", description="Base URL of a receiver of "
        "OpenTelemetry's traces, OTLP over HTTP (http://collector:4318); without it nothing is traced. Needs the extra "
        "`otel`.")
    trace_sample: float = Field(default=1.0, ge=0, le=1, description="Share of requests that are traced where the "
        "caller's `traceparent` does not say.")
    trace_queue: int = Field(default=4096, ge=1, le=2**20, description="Requests whose spans may wait to be "
        "sent; what is over it is dropped.")
    log_format: Literal["json", "console"] = Field(default="json", description="Format of the log lines.")

    @classmethod
    def settings_customise_sources(cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
                                   env_settings: PydanticBaseSettingsSource,
                                   dotenv_settings: PydanticBaseSettingsSource,
                                   file_secret_settings: PydanticBaseSettingsSource
                                   ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The first wins."""
        assert isinstance(init_settings, InitSettingsSource)
        path = init_settings.init_kwargs.get("config") or os.environ.get(VARIABLE)
        return (init_settings, env_settings, SecretFiles(settings_cls),
                FileSettings(settings_cls, None if path is None else Path(path)))

    @model_validator(mode="after")
    def _key_beyond_loopback(self) -> Self:
        if self.api_key is not None and not self.api_key.get_secret_value():
            raise ValueError("api_key is empty; leave it unset or set a key")
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(f"host {self.host} can be reached from other machines; set api_key, or use 127.0.0.1")
        return self

    @model_validator(mode="after")
    def _provider(self) -> Self:
        if (self.oidc_issuer is None) != (self.oidc_audience is None):
            raise ValueError("oidc_issuer and oidc_audience belong together")
        return self

    @field_validator("quota_store_url")
    @classmethod
    def _redis(cls, asked: SecretStr | None) -> SecretStr | None:
        if asked is not None:
            try:
                at = urlsplit(asked.get_secret_value().removeprefix("async+"))
                valid = at.scheme in ("redis", "rediss", "redis+unix") and (at.port is None or at.port > 0)
            except ValueError:
                valid = False
            if not valid:
                raise ValueError("quota_store_url begins with redis://, rediss:// or redis+unix://")
        return asked

    @field_validator("audit_redact")
    @classmethod
    def _patterns(cls, asked: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in asked:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern[:100]!r} is no regular expression: {error}") from error
        return asked

    @field_validator("outcome_graders")
    @classmethod
    def _graders_known(cls, asked: tuple[AskedGrader, ...]) -> tuple[AskedGrader, ...]:
        # The graders bring libraries along that take seconds to import; the default needs no look.
        from vectors.evaluate.graders.named import text_graders

        try:
            text_graders(asked)
        except InvalidSpec as error:
            raise ValueError(f"{path_text(error.path)}: {error.message}") from error
        return asked

    @model_validator(mode="after")
    def _origins(self) -> Self:
        for origin in self.cors_origins:
            if origin == "*" and self.api_key is None:
                raise ValueError("with cors_origins * any web page could use this server; set api_key")
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(f"cors_origins: {origin[:100]!r} is no origin such as https://app.example")
        return self

    @model_validator(mode="after")
    def _tls(self) -> Self:
        if self.tls_certificate is None and (self.tls_key or self.tls_key_password or self.tls_client_ca):
            raise ValueError("tls_key, tls_key_password and tls_client_ca need tls_certificate, because without it the "
                             "server speaks plain HTTP")
        return self

    @model_validator(mode="after")
    def _names(self) -> Self:
        for name in self.served_model_aliases:
            if not re.fullmatch(MODEL_NAME_PATTERN, name):
                raise ValueError(f"served_model_aliases: {name[:100]!r} is no name for a model, which has letters, "
                                 "digits and . _ - / :")
        names = self.model_names
        for name in names:
            if names.count(name) > 1 or name in self.vllm_adapters:
                raise ValueError(f"served_model_aliases: the name {name[:100]!r} is taken twice")
            if any(name.startswith(f"{other}:") for other in names):
                raise ValueError(f"served_model_aliases: {name[:100]!r} would be another name with a preset")
        return self

    @model_validator(mode="after")
    def _adapters(self) -> Self:
        if self.engine != "vllm" and (self.vllm_adapters or self.vllm_adapter_dir is not None):
            raise ValueError("vllm_adapters and vllm_adapter_dir need the engine vllm, because the embedded one serves "
                             "no adapters")
        for name in self.vllm_adapters:
            if not re.fullmatch(ADAPTER_NAME_PATTERN, name) or name == self.model_name:
                raise ValueError(f"vllm_adapters: {name[:100]!r} is no name for an adapter, which has letters, digits "
                                 "and . _ - / and is not that of the model")
        return self

    @property
    def model_name(self) -> str:
        """Name the base model has in the API."""
        if self.served_model_name is not None:
            return self.served_model_name
        name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(self.model).name)
        return name or "model"

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names that the base model has in the API; the first is that of metrics and receipts."""
        return self.model_name, *self.served_model_aliases

    @property
    def cache_folder(self) -> Path:
        return self.cache_dir or user_cache_path("trimtab", appauthor=False)

    @property
    def num_slots(self) -> int:
        return self.max_requests if self.slots is None else self.slots

    @property
    def library_database_url(self) -> str:
        return self.database_url or f"sqlite:///{(self.data_dir / 'library.db').absolute()}"

    @property
    def effect_store_url(self) -> str:
        return self.effects_database_url or self._beside("effects")

    @property
    def history_url(self) -> str:
        return self.history_database_url or self._beside("history")

    @property
    def responses_url(self) -> str:
        return self.responses_database_url or self._beside("responses")

    @property
    def shared_database_url(self) -> str | None:
        """Of the library, where it is a database that several servers share."""
        shared = self.database_url is not None and not self.database_url.startswith("sqlite")
        return self.database_url if shared else None

    def _beside(self, name: str) -> str:
        """Where replicas share the library they share what they measure, too."""
        if self.shared_database_url is not None:
            return self.shared_database_url
        return f"sqlite:///{(self.data_dir / name).absolute()}.db"

    @property
    def library_blob_url(self) -> str:
        return self.blob_url or (self.data_dir / "blobs").absolute().as_uri()


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, with `given` on top.

    Raises:
        InvalidSettings: naming the first setting that is wrong.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "host"
        raise InvalidSettings(first["msg"].removeprefix("Value error, "), param=name,
                              fix=f"Set TRIMTAB_{name.upper()}, the option of that name, or {name} in the file with "
                                  "settings.") from error


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
