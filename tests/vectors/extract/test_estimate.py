"""What a recipe says that it will put through the model is about what it puts through."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.vectors.extract import (
    test_function_vector,
    test_manifold,
    test_refusal_direction,
    test_sign_pattern,
    test_trial,
)
from tests.vectors.extract.toy import Toy, never, silent
from vectors.extract import parse_request, prepare

DAYS = test_manifold.DAYS
CASES = {
    "function_vector": (test_function_vector.TaskToy, {"pairs": test_function_vector.pairs()}),
    "manifold": (lambda: test_manifold.PlaceToy(test_manifold.on_ring, DAYS),
                 {"examples": test_manifold.examples(DAYS), "layout": "cyclic", "order": DAYS, "rank": 3, "layers": [1],
                  "max_eval": 1, "max_pairs": 6, "steps": 4}),
    "refusal_direction": (test_refusal_direction.Refuser, {
        "pairs": test_refusal_direction.pairs(), "readout": {"target": [" Sorry"]}, "max_kl": 0.5}),
    "sign_pattern": (test_sign_pattern.SignToy, {"anchors": test_sign_pattern.ANCHORS, "min_auc": 0.7,
                                                 "vocabulary_sample": 150}),
    "mean_difference": (test_trial.Moody, {"pairs": test_trial.pairs(), "trial": {"effort": "none"}}),
}


class Counted:
    """A subject, and how many tokens were put through it."""

    def __init__(self, subject: Toy) -> None:
        self._subject, self.tokens = subject, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._subject, name)
        if name not in ("capture", "next_logprobs", "continuation_logprobs", "write"):
            return found

        def counting(texts: Sequence[Sequence[int]], *rest: Any, **named: Any) -> Any:
            self.tokens += sum(map(len, texts))
            return found(texts, *rest, **named)

        return counting


@pytest.mark.parametrize("method", CASES)
def test_an_estimate_is_about_right(method: str) -> None:
    make, fields = CASES[method]
    subject: Any = Counted(make())
    prepared = prepare(method, parse_request(method, {"name": "made", **fields}), subject, "test")
    said = prepared.recipe.passes(prepared.request, prepared.data, prepared.subject.facts)
    prepared.run(silent, never)
    assert said is not None and 0.7 * subject.tokens < said < 1.5 * subject.tokens
