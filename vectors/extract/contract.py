"""Words that all of extraction shares: pairs as token ids, splits, progress, and the finished extraction."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from steering.artifacts.payload import Payload
from steering.language.fields import Model
from vectors.artifact import Metadata

Split = Literal["train", "dev", "test"]
TokenPosition = Literal["differing", "last_differing", "last", "mean"] | Annotated[int, Field(ge=-(2**20), le=2**20)]


class Pair(Model):
    """Two texts that differ in the concept.

    item: what the pair is about. Pairs of one item stay in one split, so that no score rests on an item seen in
    fitting; by default every pair is its own item.
    """

    positive: tuple[int, ...] = Field(description="Token ids of the text that has the concept.")
    negative: tuple[int, ...] = Field(description="Token ids of the text that lacks it.")
    item: Annotated[str, Field(max_length=256)] | None = Field(default=None, description="What the pair is about.")
    split: Split | None = Field(default=None, description="Fixed split; give it for all pairs or for none.")


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
