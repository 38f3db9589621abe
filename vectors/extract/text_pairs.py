"""Contrastive pairs as methods take them: texts that become token ids, are checked and are split by item."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from steering.language.fields import Model
from vectors.extract.contract import Pair, Split, TokenPosition
from vectors.extract.data import Dataset, prepare
from vectors.extract.items import Item
from vectors.extract.subject import Prompt, Subject, encoded


class TextPair(Model):
    """Two texts that differ in the concept."""

    positive: Prompt = Field(description="The text that has the concept.")
    negative: Prompt = Field(description="The text that lacks it.")
    item: Item | None = Field(default=None, description="What the pair is about; pairs of one item share a split.")
    split: Split | None = Field(default=None, description="Fixed split; for all pairs or for none.")


TextPairs = Annotated[list[TextPair], Field(min_length=1, max_length=100_000)]


def paired(pairs: Sequence[TextPair], subject: Subject, seed: int, *, param: str = "pairs",
           token: TokenPosition = "last") -> Dataset:
    """Raises InvalidData: one of its kinds, naming the pair as `pairs[i]`."""
    rendered = [Pair(positive=encoded(subject, pair.positive, (param, n, "positive")),
                     negative=encoded(subject, pair.negative, (param, n, "negative")),
                     item=pair.item, split=pair.split) for n, pair in enumerate(pairs)]
    return prepare(rendered, token, subject.facts, seed)
