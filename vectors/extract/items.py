"""Labelled texts checked, hashed and split by the item they are about."""

import hashlib
import json
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from steering.language.fields import Model
from vectors.extract.contract import Split
from vectors.extract.data import DEV_SHARE, MIN_ITEMS, SPLITS, TRAIN_SHARE
from vectors.extract.refusals import LeakingSplit, NoContrast, OneClass, TooFewExamples
from vectors.extract.subject import Prompt, Subject, Tokens, encoded

Label = Annotated[str, Field(min_length=1, max_length=256)]
Item = Annotated[str, Field(max_length=256)]
Splits = Mapping[Split, tuple[int, ...]]
MAX_EXAMPLES = 100_000


class Example(Model):
    """A text with its label. Examples of one item stay in one split; by default every text is its own item."""

    text: Prompt = Field(description="Plain text, a conversation or token ids.")
    label: Label = Field(description="Its class.")
    item: Item | None = Field(default=None, description="What it is about.")
    split: Split | None = Field(default=None, description="Fixed split; give it for all examples or for none.")


Examples = Annotated[list[Example], Field(min_length=1, max_length=MAX_EXAMPLES)]


@dataclass(frozen=True)
class Labelled:
    """texts: token ids. splits: indices into them. digest: sha256 of texts, labels, items and splits."""

    texts: tuple[Tokens, ...]
    labels: tuple[str, ...]
    splits: Splits
    digest: str

    def counts(self) -> dict[str, Any]:
        return {split: len(members) for split, members in self.splits.items()}


def labelled(examples: Sequence[Example], subject: Subject, seed: int, *, param: str = "examples",
             target: str | None = None, complete: Sequence[Split] = SPLITS) -> Labelled:
    """Check examples and split them. With a `target` there are two classes, the target and the rest. `complete`: the
    splits that must have examples of every class.

    Raises:
        InvalidData: one of its kinds, naming the example as `examples[i]`.
    """
    texts = tuple(encoded(subject, example.text, (param, n, "text")) for n, example in enumerate(examples))
    labels = tuple(example.label for example in examples)
    classes = {label == target for label in labels} if target is not None else set(labels)
    if target is not None and target not in labels:
        raise OneClass(f"no example has the label {target!r}", param=param, fix="Give examples of it, or correct it.")
    if len(classes) < 2:
        raise OneClass("all examples are of one class", param=param,
                       fix="Give examples of what the artifact should be told apart from, too.")
    items = [example.item if example.item is not None else f"#{n}" for n, example in enumerate(examples)]
    seen: dict[Tokens, int] = {}
    for n, text in enumerate(texts):
        first = seen.setdefault(text, n)
        if labels[first] != labels[n]:
            raise NoContrast(f"the text repeats {param}[{first}], which has another label", param=(param, n))
        if items[first] != items[n]:
            raise LeakingSplit(f"the text repeats {param}[{first}], under another item", param=(param, n),
                               fix="Leave it out, or give both the same item.")
    splits = split_items(items, [example.split for example in examples], seed, param,
                         strata=[label == target if target is not None else label for label in labels])
    for split, members in splits.items():
        kinds = {labels[n] == target if target is not None else labels[n] for n in members}
        if split in complete and len(kinds) < len(classes):
            raise OneClass(f"the {split} split does not have examples of every class", param=param,
                           fix="Give more examples about other items, or splits of your own.")
    return Labelled(texts, labels, splits, digest_of([texts, labels, items, splits]))


def split_items(items: Sequence[str], given: Sequence[Split | None], seed: int, param: str, *,
                strata: Sequence[Hashable] | None = None) -> Splits:
    """Indices per split: as given for all, else drawn 60/20/20 by item, alike in every stratum.

    Raises:
        TooFewExamples, LeakingSplit.
    """
    assigned: dict[str, Split] = {}
    if any(split is not None for split in given):
        for n, (item, split) in enumerate(zip(items, given, strict=True)):
            if split is None:
                raise LeakingSplit("this entry has no split, others have", param=(param, n, "split"),
                                   fix="Give splits for all or for none.")
            if assigned.setdefault(item, split) != split:
                raise LeakingSplit(f"item {item!r} is in the splits {assigned[item]} and {split}",
                                   param=(param, n, "split"), fix="Keep all entries of an item in one split.")
    else:
        names = sorted(set(items))
        if len(names) < MIN_ITEMS:
            raise TooFewExamples(f"{len(names)} distinct items; at least {MIN_ITEMS} are needed to fit, choose and "
                                 "test", param=param, fix="Give more, about other items.")
        kinds = strata if strata is not None else [0] * len(items)
        of_item: dict[str, set[str]] = {name: set() for name in names}
        for item, kind in zip(items, kinds, strict=True):
            of_item[item].add(repr(kind))
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            groups.setdefault(tuple(sorted(of_item[name])), []).append(name)
        chance = random.Random(seed)
        for key in sorted(groups):
            group = groups[key]
            chance.shuffle(group)
            num_train, num_dev = round(TRAIN_SHARE * len(group)), max(1, round(DEV_SHARE * len(group)))
            for n, name in enumerate(group):
                assigned[name] = "train" if n < num_train else "dev" if n < num_train + num_dev else "test"
    splits: Splits = {split: tuple(n for n, item in enumerate(items) if assigned[item] == split) for split in SPLITS}
    for split, members in splits.items():
        if not members:
            raise TooFewExamples(f"the {split} split is empty", param=param, fix="Give more, about other items.")
    return splits


def digest_of(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()
