"""Why speculative decoding is refused, shown with the refusal lifted: texts are the same, but a draft that is thrown
away is measured, and ends its request where its step is over the limit."""

import asyncio
from typing import Any

import pytest

from lab import model_path
from server.engines.data import Touched
from server.engines.vllm.host import arguments
from server.errors import InvalidSettings
from steering.acting.containment import StepLimit
from steering.language.errors import SteeringLimit
from tests.engines.cases import vector
from tests.engines.conftest import compiled, generate, ids
from tests.engines.vllm.conftest import ONE_PROCESS, running

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
# The model drafts for itself, unsteered. Under the programs below its drafts are wrong at times.
DRAFT_MODEL = {"method": "draft_model", "model": str(model_path("lab-dense")), "num_speculative_tokens": 3}
PROMPTS = ([5, 6, 7, 8] * 6, list(range(20, 44)), [9, 10, 11] * 8)


@pytest.mark.parametrize("speculation", [NGRAM, DRAFT_MODEL])
def test_it_is_refused_with_the_reason(speculation: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettings, match="drafts that are thrown away") as refused:
        arguments.check_arguments({"speculative_config": speculation})
    assert refused.value.path == ("vllm_args", "speculative_config")


async def answers(limit: float, speculation: dict[str, Any]) -> list[tuple[list[int], list[Touched]] | str]:
    """Of every prompt under three programs; the code of the error where there is one."""
    found: list[tuple[list[int], list[Touched]] | str] = []
    changes = {"extra": {**ONE_PROCESS["extra"], **speculation}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        async with running("lab-dense", eager=True, step_limit=StepLimit.of(limit, "refuse"), **changes) as group:
            push = {"op": "add", "strength": 8.0, "inline": {"vector": vector(1, 128).tolist()}}
            window = {"prompt": "none", "generation": {"windows": [[3, 7]]}}
            programs = [None, compiled(group.engine, {**push, "layers": [2]}),  # type: ignore[arg-type]
                        compiled(group.engine, {**push, "layers": [1, 3], "scope": window})]  # type: ignore[arg-type]
            for prompt in PROMPTS:
                for program in programs:
                    try:
                        tokens, touched = await generate(group.engine, prompt, program, max_tokens=24)  # type: ignore[arg-type]
                        found.append((ids(tokens), touched))
                    except SteeringLimit as error:
                        found.append(error.code)
    return found


@pytest.fixture(scope="module")
def plain() -> list[tuple[list[int], list[Touched]] | str]:
    return asyncio.run(answers(1e4, {}))


@pytest.mark.slow
@pytest.mark.parametrize("speculation", [NGRAM, DRAFT_MODEL])
async def test_a_draft_that_is_thrown_away_counts(plain: list[tuple[list[int], list[Touched]] | str],
                                                  speculation: dict[str, Any],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(arguments.OFF_ONLY, "speculative_config")
    drafted = await answers(1e4, {"speculative_config": speculation})
    # Texts and counts of touched tokens are the same. Steps, which equality leaves out, are not.
    assert drafted == plain
    own, counted = largest_steps(plain), largest_steps(drafted)
    apart = [after - before for before, after in zip(own, counted, strict=True)]
    where = max(range(len(apart)), key=apart.__getitem__)
    assert apart[where] > 0.01, "with these prompts no draft takes the largest step; the test shows nothing"
    # So a request ends under a limit that no token which it has is over.
    limited = await answers((own[where] + counted[where]) / 2, {"speculative_config": speculation})
    assert limited[where] == SteeringLimit.code


def largest_steps(answers: list[tuple[list[int], list[Touched]] | str]) -> list[float]:
    return [max([0.0, *(one.largest_step or 0.0 for one in found[1])])
            for found in answers if not isinstance(found, str)]
