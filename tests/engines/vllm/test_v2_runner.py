"""vLLM's second model runner, the one that GPUs get, with its Triton kernels interpreted on the CPU."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.engines.vllm import checks, resuming
from tests.engines.vllm.conftest import ONE_PROCESS, TIGHT, Group, running
from tests.sweeps import sweep_of

SHIM = Path(__file__).parent / "interpreted"
pytestmark = pytest.mark.asyncio(loop_scope="module")
pytest.importorskip("triton", reason="the second runner's kernels are written in Triton")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Processes that start from here find the shim; in this one vLLM only has to believe that they will."""
    import vllm.config.vllm as config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SHIM), prepend=":")
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        patch.setattr(config, "HAS_TRITON", True)
        yield


# Compiled as on a GPU, with all that the graph can hold, and eager.
GROUPS = {
    "dense-compiled": ("lab-dense", {"graph_ops": "all"}),
    "dense-eager": ("lab-dense", {"eager": True}),
    "moe-compiled": ("lab-moe", {"graph_ops": "all"}),
    "moe-eager": ("lab-moe", {"eager": True}),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module",
                        params=sweep_of(slow=list(GROUPS)))
async def group(request: pytest.FixtureRequest, interpreter: None) -> AsyncIterator[Group]:
    name, changes = GROUPS[request.param]
    async with running(name, **changes, **TIGHT, **ONE_PROCESS) as started:
        yield started


async def test_it_is_the_second_runner_and_exact(group: Group) -> None:
    assert (await group.engine.connection.rpc("trimtab_describe"))[0]["v2"]
    await checks.mixed_batch_equals_hooks(group, rounds=1)


async def test_measurements(group: Group) -> None:
    await checks.scores_equal_hooks(group, checks.cases_of(group)[:2])
    await checks.capture_is_what_hooks_see(group)
    await checks.comparison_equals_two_plain_passes(group)


async def test_resumed_completions(group: Group) -> None:
    await resuming.goes_on_as_in_one_go(group, draws_by_position=True)
    await resuming.goes_on_under_another_program(group)


async def test_preemption(group: Group) -> None:
    # Few tokens: interpreted kernels take their time.
    await checks.preempted_requests_stay_right(group, count=15, new_tokens=12)


async def test_draws_of_a_seed(group: Group) -> None:
    await checks.seeded_draws_do_not_depend_on_chunks(group, draws_by_position=True)
    await checks.low_temperatures_are_those_that_were_asked_for(group)


async def test_rules_by_generated_token_id(group: Group) -> None:
    await checks.rules_by_generated_token_id(group)
