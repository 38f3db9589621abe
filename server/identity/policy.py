"""What a tenant's or a key's requests may ask of steering, beyond the roles of their keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from server.errors import PolicyViolation
from steering.language.errors import Path
from steering.language.fields import MAX_INTERVENTIONS
from steering.language.spec import Spec
from steering.language.vocabulary import Op, Site

Pattern = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._/@*?\[\]!-]+$")]
Patterns = Annotated[list[Pattern], Field(max_length=256)]
Ceiling = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


Amount = Annotated[int, Field(ge=1, le=2**53)]
Period = Literal["day", "month"]


class Quota(BaseModel):
    """How much may be used. Null: as much as there is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    requests_per_minute: Amount | None = None
    tokens_per_minute: Amount | None = Field(default=None, description="Of prompts and completions.")
    parallel_requests: Amount | None = Field(default=None, description="Answered at once, streams until their end.")
    tokens_per_period: Amount | None = None
    period: Period = Field(default="month", description="Of the clock, in UTC.")
    library_bytes: Amount | None = Field(default=None, description="That the names of the tenant may hold, equal "
                                         "numbers once. Of a tenant only.")
    library_names: Amount | None = Field(default=None, description="Artifacts and presets of the tenant. Of a tenant "
                                         "only.")
    weight: Annotated[float, Field(ge=0.01, le=100)] = Field(
        default=1.0, description="Share of the engine under load: one of weight 2 has twice the tokens of one of 1. "
        "Tenants among each other, and keys within their tenant.")


class Policy(BaseModel):
    """Rules for what requests ask for. The server's default spec and mandatory specs are the operator's own, and no
    rule is about them. Null, or a rule that is left out: no rule."""

    model_config = ConfigDict(extra="forbid", strict=True)

    models: Patterns | None = Field(default=None, description="Names of models and adapters that may be asked, with * "
                                    "and ?.")
    presets: Patterns | None = Field(default=None, description="Presets that may be named, also behind a model's name. "
                                     "A pattern with @ is compared with name and version.")
    artifacts: Patterns | None = Field(default=None, description="Artifacts that may act, gate or be read, also those "
                                       "of presets.")
    ops: Annotated[list[Op], Field(max_length=32)] | None = None
    sites: Annotated[list[Site], Field(max_length=32)] | None = None
    most_interventions: Annotated[int, Field(ge=0, le=MAX_INTERVENTIONS)] | None = Field(
        default=None, description="Of a request, those of its presets included.")
    raw_vectors: bool = Field(default=True, description="Whether requests may bring numbers of their own.")
    reports: bool = Field(default=True, description="Whether requests may have their effect measured or graded.")
    captures: bool = Field(default=True, description="Whether requests may read activations: monitors, the "
                           "lens and captures.")
    most_rel: Ceiling | None = Field(
        default=None, description="How far all steps of a request together may move a token at one layer, as a share "
        "of the mean norm that artifacts record. What cannot be told, of numbers without such a record say, is "
        "refused. Ops that add no direction are refused unless ops names them, and then act once over at most.")
    most_nats: Ceiling | None = Field(
        default=None, description="How much all steps of a request together may move the next-token distribution, by "
        "their calibrations. Steps without one are held to most_rel, and refused where there is none.")
    over: Literal["refuse", "clip"] = Field(default="refuse", description="What becomes of a strength over a ceiling. "
                                            "clip: it is lowered, and the receipt says so.")
    quota: Quota | None = Field(default=None, description="How much may be used.")
    mandatory: Spec | None = Field(default=None, description="Acts first in every request, whatever it says.")


@dataclass(frozen=True)
class Held:
    """A policy that holds for a key. of: whose it is, "tenant team" say. scope: the same for counters."""

    of: str
    policy: Policy
    scope: str = ""

    @property
    def quota(self) -> Quota:
        return self.policy.quota or NO_QUOTA

    def violated(self, rule: str, what: str, param: Path, fix: str | None = None) -> PolicyViolation:
        return PolicyViolation(f"the policy of {self.of} forbids this by its rule {rule}: {what}", param=param,
                               fix=fix or "Ask for less, or have an administrator change the policy.")

    def check_model(self, name: str) -> None:
        if self.policy.models is not None and not matches(name, self.policy.models):
            raise self.violated("models", f"the model {name[:100]!r} is not among them", ("model",))


NO_QUOTA = Quota()


def matches(name: str, patterns: Sequence[str], version: int | str | None = None) -> bool:
    """version: of what the name was resolved to; None while that is not known, and patterns of versions count as those
    of their names."""
    for pattern in patterns:
        of_name, at, of_version = pattern.partition("@")
        if fnmatchcase(name, of_name) and (not at or version is None or fnmatchcase(str(version), of_version)):
            return True
    return False
