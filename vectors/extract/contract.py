"""What goes into an extraction and what comes out. Texts arrive as token ids: the caller has rendered them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field

from steering.artifacts.payload import Payload
from steering.language.fields import Model
from steering.language.layers import Layers
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from vectors.artifact import Metadata, Name, Tags, Text

MethodName = Literal["mean_difference", "pca_pairwise", "pca_repe", "logistic_probe"]
Split = Literal["train", "dev", "test"]
TokenPosition = Literal["last", "mean"] | Annotated[int, Field(ge=-(2**20), le=2**20)]


class Pair(Model):
    """Two texts that differ in the concept.

    item: what the pair is about. Pairs of one item stay in one split, so that no score rests on an item seen in
    fitting; by default every pair is its own item.
    """

    positive: tuple[int, ...] = Field(description="Token ids of the text that has the concept.")
    negative: tuple[int, ...] = Field(description="Token ids of the text that lacks it.")
    item: Annotated[str, Field(max_length=256)] | None = Field(default=None, description="What the pair is about.")
    split: Split | None = Field(default=None, description="Fixed split; give it for all pairs or for none.")


class ExtractOptions(Model):
    """How to take a direction from contrastive pairs."""

    name: Name = Field(description="Artifact to make, or to make a new version of.")
    method: MethodName = Field(default="mean_difference", description="How the direction is fitted.")
    site: Site = Field(default="resid_post", description="Where activations are read, and later changed.")
    layers: Layers = Field(default="all", description="Layers to fit; the best one becomes the artifact's default.")
    token: TokenPosition = Field(
        default="last", description="Token to read: last, mean (all but the first, which many models use as a sink), "
        "or a position; negative ones count from the end.")
    op: Op = Field(default="add", description="What the artifact is meant for: add, ablate or clamp.")
    options: dict[str, Any] = Field(default={}, description="Default options of that op.")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of splits and controls.")
    description: Text = Field(default="", description="What the artifact does, for people.")
    tags: Tags = Field(default=(), description="Labels to filter by.")


@dataclass(frozen=True)
class ExtractRequest:
    """options: as the user gave them. pairs: rendered to token ids. facts: of the model that `capture` reads.
    spelling: what the caller who rendered them says of it (`spelling.spelling_report`), for the report.
    """

    options: ExtractOptions
    pairs: Sequence[Pair]
    facts: ModelFacts
    created_by: str
    spelling: Mapping[str, Any] = field(default_factory=dict)


class Capture(Protocol):
    """Reads activations of a batch of texts, from an engine or from anything that stands for one."""

    def __call__(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                 positions: Sequence[int] | None) -> Sequence[Mapping[int, torch.Tensor]]:
        """Per text: layer -> `[num_positions, width]` float32; all positions of the text if `positions` is None."""
        ...


Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and the stage: "capture", "fit" or "control"."""

Cancelled = Callable[[], bool]
"""Asked between batches and layers; once true, the run ends with `ExtractionCancelled`."""


@dataclass(frozen=True)
class Extraction:
    """An artifact ready to be stored, and the report of how good it is (also in `metadata.provenance["report"]`)."""

    metadata: Metadata
    payload: Payload
    report: Mapping[str, Any]
