"""Sections in vLLM's workers and scheduler, without an engine: chunks, requests that come back, cached blocks."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from server.engines.vllm.host.taken import Taken
from server.engines.vllm.wire import EXTRA, Fault
from server.engines.vllm.worker.cachekeys import block_key
from server.engines.vllm.worker.ops import _carried_out
from server.engines.vllm.worker.stage import steered
from server.engines.vllm.worker.steps import Steps
from steering.language.scope import Scope
from steering.programs.touch import Touch
from tests.engines.section_cases import SCOPES, SECTIONS, spelled, touching
from tests.engines.vllm.test_tally import KEY, OPAQUE, D, program, steps_of

PROMPT = [9, 8, 9]
# Each number modulo seven is a piece of a mark.
WRITTEN = [5, 7, 8, 5, 2, 12, 3, 6, 4, 5, 7, 1, 6]


def params(scope: int, **more: Any) -> Any:
    parsed = Scope.model_validate({"prompt": "none", "generation": SCOPES[scope][0]})
    touch = Touch.of([parsed], PROMPT, len(WRITTEN) + 1, sections=SECTIONS)
    touch.settle(more.pop("settled", []))
    return SimpleNamespace(extra_args={EXTRA: {"slot": 1, "digest": "a", "touch": touch.to_plain(), "name": "n"}})


def touched(steps: Steps, before: int, now: int) -> list[int]:
    """Positions that a step over tokens [before, before + now) of the request acts on."""
    ids = [*PROMPT, *WRITTEN]
    steps.begin(["r"], np.array([0, now]), np.array([before]), now,
                lambda: np.array(ids[before:before + now], dtype=np.int64), lambda row, start, stop: ids[start:stop])
    place, number, given = steps.graph.places[KEY], steps.graph.token[:now], torch.ones(now, D)
    out, _ = steered(given, place.pool.tensor, place.index[number], place.scalars[number], 2, 2, False, torch.float32,
                     steps.graph.limit)
    out = _carried_out(steps, out, steps.stages(OPAQUE), torch.float32)
    found = [before + n for n in torch.nonzero((out != given).any(1)).flatten().tolist()]
    steps.collect(torch.zeros(now, D))
    steps.done()
    return found


@pytest.mark.parametrize("key", [KEY, OPAQUE])
@pytest.mark.parametrize("scope", range(len(SCOPES)))
def test_a_worker_follows_sections_token_by_token_in_chunks_and_after_a_return(key: Any, scope: int) -> None:
    marks = touching(WRITTEN, *SCOPES[scope][1:], len(PROMPT))(0, len(PROMPT) + len(WRITTEN))
    wanted = [n for n, on in enumerate(marks) if on]
    for cuts in ([3, *[1] * 13], [16], [5, 4, 7]):
        steps = steps_of()
        steps.spellings = list(map(spelled, range(20)))
        steps.place(1, program("a", 1.0, key=key))
        steps.add("r", params(scope))
        found, at = [], 0
        for count in cuts:
            found += touched(steps, at, count)
            at += count
        assert found == wanted
        # Set back, and computed again from the beginning; then from a block that another request had put there.
        assert touched(steps, 0, 9) == [n for n in wanted if n < 9]
        steps.add("r", params(scope))
        assert touched(steps, 8, 8) == [n for n in wanted if n >= 8]
        # Gone on with from tokens that the host has settled.
        steps.add("r", params(scope, settled=WRITTEN[:6]))
        assert touched(steps, 9, 7) == [n for n in wanted if n >= 9]
        assert touched(steps, 3, 6) == [n for n in wanted if 3 <= n < 9]


def test_a_worker_that_cannot_spell_ends_the_request() -> None:
    steps = steps_of()
    steps.place(1, program("a", 1.0))
    steps.add("r", params(1))
    assert touched(steps, 0, 5) == []
    assert Taken.of(steps.tallies.take(["n"])).fault == Fault("program", 0)


def test_cached_blocks_are_shared_only_where_sections_must_be_equal() -> None:
    def key(given: Any, start: int, end: int) -> bytes | None:
        return block_key(SimpleNamespace(sampling_params=given, all_token_ids=[*PROMPT, *WRITTEN]), start, end)

    assert key(params(1), 0, 3) is None, "the prompt is everybody's"
    assert key(params(1), 0, 8) == key(params(1), 0, 8) != key(params(2), 0, 8)
    # Settled or not, the tokens are the same, but what is settled lies in the map.
    other = params(1)
    other.extra_args[EXTRA]["digest"] = "b"
    assert key(other, 4, 8) != key(params(1), 4, 8)
