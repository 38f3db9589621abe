"""Pairs checked, hashed and split into train, dev and test by the item they are about."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from steering.language.errors import InvalidRequest
from steering.models.facts import ModelFacts
from vectors.extract.contract import Pair, Split, TokenPosition
from vectors.extract.refusals import EmptyText, LeakingSplit, NoContrast, TextTooLong, TooFewPairs

MIN_ITEMS = 10
MIN_PAIRS_PER_SPLIT = 2
MAX_PAIRS = 100_000
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
TRAIN_SHARE, DEV_SHARE = 0.6, 0.2


@dataclass(frozen=True)
class Dataset:
    """digest: sha256 of pairs, items and splits. splits: indices into `pairs`."""

    pairs: tuple[Pair, ...]
    splits: dict[Split, tuple[int, ...]]
    digest: str


def prepare(pairs: Sequence[Pair], token: TokenPosition, facts: ModelFacts, seed: int) -> Dataset:
    """Check the pairs and split them.

    Raises:
        InvalidData: one of its kinds, naming the pair as `pairs[i]`.
    """
    if len(pairs) > MAX_PAIRS:
        raise InvalidRequest(f"{len(pairs)} pairs, more than {MAX_PAIRS}", param="pairs")
    for number, pair in enumerate(pairs):
        _check_pair(pair, number, token, facts)
    items = [pair.item if pair.item is not None else f"#{number}" for number, pair in enumerate(pairs)]
    _check_repeats(pairs, items)
    assigned = _given_splits(pairs, items) or _draw_splits(items, seed)
    splits = {split: tuple(n for n, item in enumerate(items) if assigned[item] == split) for split in SPLITS}
    for split, members in splits.items():
        if len(members) < MIN_PAIRS_PER_SPLIT:
            raise TooFewPairs(f"the {split} split has {len(members)} pairs and needs {MIN_PAIRS_PER_SPLIT}",
                              param="pairs", fix="Give more pairs, or leave the splits to the server.")
    document = [[pair.positive, pair.negative, items[n], assigned[items[n]]] for n, pair in enumerate(pairs)]
    digest = hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()
    return Dataset(tuple(pairs), splits, digest)


def _check_pair(pair: Pair, number: int, token: TokenPosition, facts: ModelFacts) -> None:
    for side in ("positive", "negative"):
        ids: tuple[int, ...] = getattr(pair, side)
        where = ("pairs", number, side)
        if not ids:
            raise EmptyText("the text is empty", param=where)
        if len(ids) > facts.context_length:
            raise TextTooLong(f"the text has {len(ids)} tokens; {facts.model_id} takes {facts.context_length}",
                              param=where, fix="Shorten it, or leave the pair out.")
        if max(ids) >= facts.vocab_size or min(ids) < 0:
            raise InvalidRequest(f"a token id is outside the vocabulary of {facts.vocab_size}", param=where)
        if isinstance(token, int) and not -len(ids) <= token < len(ids):
            raise InvalidRequest(f"token {token} does not exist in pairs[{number}].{side}, which has {len(ids)} tokens",
                                 param="token", fix="Use last or mean, or drop the short texts.")
    if pair.positive == pair.negative:
        raise NoContrast("both texts are the same after tokenizing", param=("pairs", number),
                         fix="Give a positive text that shows the concept and a negative one that does not.")


def _check_repeats(pairs: Sequence[Pair], items: Sequence[str]) -> None:
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for number, pair in enumerate(pairs):
        first = seen.setdefault((pair.positive, pair.negative), number)
        if items[first] != items[number]:
            raise LeakingSplit(f"the pair is the same as pairs[{first}], under another item", param=("pairs", number),
                               fix="Leave it out, or give both the same item.")
        if (pair.negative, pair.positive) in seen:
            raise NoContrast(f"the pair is pairs[{seen[pair.negative, pair.positive]}] the other way round",
                             param=("pairs", number), fix="Leave one of them out.")


def _given_splits(pairs: Sequence[Pair], items: Sequence[str]) -> dict[str, Split] | None:
    given = [number for number, pair in enumerate(pairs) if pair.split is not None]
    if not given:
        return None
    assigned: dict[str, Split] = {}
    for number, (pair, item) in enumerate(zip(pairs, items, strict=True)):
        if pair.split is None:
            raise InvalidRequest("this pair has no split, others have", param=("pairs", number, "split"),
                                 fix="Give splits for all pairs or for none.")
        if assigned.setdefault(item, pair.split) != pair.split:
            raise LeakingSplit(f"item {item!r} is in the splits {assigned[item]} and {pair.split}",
                               param=("pairs", number, "split"), fix="Keep all pairs of an item in one split.")
    return assigned


def _draw_splits(items: Sequence[str], seed: int) -> dict[str, Split]:
    names = sorted(set(items))
    if len(names) < MIN_ITEMS:
        raise TooFewPairs(f"{len(names)} distinct items; at least {MIN_ITEMS} are needed to fit, choose and test",
                          param="pairs", fix="Give more pairs about other items.")
    random.Random(seed).shuffle(names)
    num_train, num_dev = round(TRAIN_SHARE * len(names)), max(1, round(DEV_SHARE * len(names)))
    return {name: "train" if n < num_train else "dev" if n < num_train + num_dev else "test"
            for n, name in enumerate(names)}
