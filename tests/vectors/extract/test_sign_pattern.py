"""Sign patterns on a vocabulary some of whose tokens carry planted signs."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.language.errors import InvalidRequest, TrimtabError
from tests.vectors.extract.toy import D_MODEL, Toy, never, silent
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods.sign_pattern import DRAFT_DIMS
from vectors.extract.refusals import EmptyText, LeakingSplit, TooFewExamples

DIMS = (3, 8, 11, 20, 29)
POLARITY = (1, -1, -1, 1, 1)
MASSIVE_DIM = 17
ANCHORS = [f"w{n}" for n in range(40)]


class SignToy(Toy):
    """From block 1 on the anchors' planted dims have the planted signs; dim 17 is massive."""

    def __init__(self) -> None:
        super().__init__()
        # So that a block can turn any dim of the stream.
        self.w_down = torch.eye(D_MODEL, dtype=torch.float64).expand(3, D_MODEL, D_MODEL)
        for word in ANCHORS:
            self.token(word)

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        h = super().embed(ids)
        h[:, MASSIVE_DIM] = 400.0 * torch.tensor([1.0 if 1 <= token <= 40 else -1.0 for token in ids])
        return h

    def neurons(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(ids), D_MODEL, dtype=torch.float64)
        if layer == 1:
            for i, token in enumerate(ids):
                if 1 <= token <= 40:
                    for dim, sign in zip(DIMS, POLARITY, strict=True):
                        out[i, dim] = sign * abs(float(resid[i, dim])) - float(resid[i, dim])
        return out


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    request = parse_request("sign_pattern", {"name": "signs", "anchors": ANCHORS, "min_auc": 0.7, **fields})
    return prepare("sign_pattern", request, toy or SignToy(), "test").run(silent, never)


def test_planted_dims_and_signs_are_found() -> None:
    found = extract()
    assert found.report["best_layer"] in (1, 2)
    for layer in (1, 2):
        numbers = found.payload.layers[layer]
        signs = dict(zip(numbers["dims"].tolist(), numbers["polarity"].tolist(), strict=True))
        assert signs == dict(zip(DIMS, POLARITY, strict=True))
    assert 0 not in found.payload.layers
    assert found.report["layers"]["1"]["test_auc"] > 0.9
    control = found.report["controls"]["random_anchors"]
    assert control["draws"] == 20 and control["percentile"] >= 95
    assert abs(control["mean"] - 0.5) < 0.15
    assert found.report["layers"]["1"]["massive_dims_left_out"] == 1
    assert (found.metadata.kind, found.metadata.op, found.metadata.options) == (
        "sign_pattern", "sign_flip", {"mode": "away"})


def test_anchors_that_have_nothing_in_common_give_a_draft() -> None:
    found = extract(Toy(), anchors=[f"z{n}" for n in range(60)])
    card = found.metadata.card or {}
    assert "no dim reaches" in card["draft"] and card["dims"] == DRAFT_DIMS
    assert any("AUC" in warning for warning in card["warnings"])


def test_a_sample_of_the_vocabulary_does() -> None:
    found = extract(vocabulary_sample=150)
    assert 150 <= found.report["vocabulary"] <= 190 < found.report["vocabulary_size"]
    # Few tokens leave more open than all of them.
    errors = [one.report["layers"]["1"]["test_auc_error"] for one in (found, extract())]
    assert min(errors) >= 0 and max(errors) < 0.2
    dims = set(found.payload.layers[1]["dims"].tolist())
    assert dims <= set(DIMS) and len(dims) >= 3


@pytest.mark.parametrize(("anchors", "error", "param"), [
    ([*ANCHORS, " "], EmptyText, "anchors[40]"),
    ([*ANCHORS, "two words"], InvalidRequest, "anchors[40]"),
    ([*ANCHORS, "w7"], LeakingSplit, "anchors[40]"),
    (ANCHORS[:6], TooFewExamples, "anchors"),
])
def test_bad_anchors_are_refused(anchors: list[str], error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(anchors=anchors)
    assert caught.value.param == param


def test_anchors_of_several_tokens_can_be_left_out_with_their_splits() -> None:
    splits = [("train", "train", "train", "dev", "test")[n % 5] for n in range(40)]
    mixed = [text for anchor in ANCHORS for text in (anchor, f"two {anchor}")]
    found = extract(anchors=mixed, splits=[split for split in splits for _ in (0, 1)], single_token=True)
    assert found.report["anchors_left_out"] == 40
    assert found.report["anchors"] == {"train": 24, "dev": 8, "test": 8}
    alone = extract(splits=splits)
    assert torch.equal(found.payload.layers[1]["dims"], alone.payload.layers[1]["dims"])
    with pytest.raises(InvalidRequest):
        extract(anchors=["two words"] * 3, single_token=True)
