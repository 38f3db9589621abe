"""Two ranks that share a model, over gloo on the CPU: what one rank does to its half is what hooks do to the whole."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch

from steering.language.errors import SteeringOverflow
from tests.engines import reference as ref
from tests.engines.conftest import compiled, generate
from tests.engines.vllm import checks
from tests.engines.vllm.conftest import TIGHT, Group, running
from tests.sweeps import sweep_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Compiled, with sites in the graph whose width is split among the ranks.
    "tensor-dense": ("lab-dense", {"tensor_parallel": 2, "graph_ops": "all",
                                    "graph_sites": ("resid_post", "head_out", "mlp_act")}),
    "tensor-moe": ("lab-moe", {"tensor_parallel": 2, "graph_ops": "all"}),
    "tensor-moe-eager": ("lab-moe", {"tensor_parallel": 2, "eager": True}),
    # The buffers between the parts of a pipeline are made when vLLM warms up, which its eager engine on the CPU skips:
    # the model is traced and then run as it is.
    "pipeline-dense": ("lab-dense", {"extra": {"pipeline_parallel_size": 2,
                                               "compilation_config": {"mode": 2, "backend": "eager"}}}),
    "data-dense": ("lab-dense", {"extra": {"data_parallel_size": 2}, "eager": True}),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=sweep_of(slow=list(LAYOUTS)))
async def group(request: pytest.FixtureRequest) -> AsyncIterator[Group]:
    with pytest.MonkeyPatch.context() as patch:
        # One core for each rank; the ranks wait for each other at every layer.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        name, changes = LAYOUTS[request.param]
        async with running(name, **changes, **TIGHT) as started:
            yield started


async def test_hooks_of_the_ranks(group: Group) -> None:
    """Ranks that share a layer have the same hooks; in a pipeline each has those of its half."""
    places = [[tuple(place) for place in described["places"]] for described in group.engine.connection.described]
    if group.engine.options.tensor_parallel == 2:
        assert len(places) == 2 and places[0] == places[1]
    elif "pipeline_parallel_size" in group.engine.options.extra:
        assert [sorted({layer for _, layer in part}) for part in places] == [[0, 1, 2], [3, 4, 5]]
    else:
        # Each replica has the whole model.
        assert len(places) == 2 and places[0] == places[1]


async def test_every_spec_equals_hooks(group: Group) -> None:
    await checks.mixed_batch_equals_hooks(group)


async def test_masks_on_either_half_and_across(group: Group) -> None:
    """Heads and neurons of one rank alone, of the other alone, and of both."""
    facts = group.engine.facts
    for heads in ([0], [facts.num_heads - 1], [1, 2]):
        columns = [c for head in heads for c in range(head * facts.head_dim, (head + 1) * facts.head_dim)]
        await _masked(group, {"op": "head_mask", "layers": [2], "inline": {"heads": heads}, "options": {"scale": -2.0}},
                      ref.Edit("head_out", 2, ref.scale_columns(columns, -2.0), ref.everywhere))
    half = facts.d_ff // 2
    # The neurons of mixture layers are not one place.
    for neurons in () if facts.num_experts else ([0, 1, half - 1], [half, facts.d_ff - 1], [half - 1, half]):
        values = torch.tensor([25.0] * len(neurons))
        await _masked(group, {"op": "neuron_mask", "layers": [3], "options": {"mode": "set"},
                              "inline": {"neurons": neurons, "value": values.tolist()}},
                      ref.Edit("mlp_act", 3, ref.set_columns(neurons, values), ref.everywhere))


async def _masked(group: Group, spec: dict[str, object], edit: ref.Edit) -> None:
    prompt = checks.prompt_of(8)
    tokens, _ = await generate(group.engine, prompt, compiled(group.engine, spec), max_tokens=4)
    checks.check_tokens(group, prompt, tokens, [edit], steered=True)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
async def test_an_overflow_on_any_rank_stays_with_its_request(group: Group, site: str) -> None:
    """In the first half of the layers and in the second, which in a pipeline are different workers; only the last one's
    output is heard. Steps are told of both."""
    engine, d = group.engine, group.engine.facts.d_model

    def push(strength: float, layer: int) -> dict[str, object]:
        return {"op": "add", "site": site, "layers": [layer], "strength": strength,
                "inline": {"vector": [1.0] + [0.0] * (d - 1)}}

    for layer in (1, 4):
        program = compiled(engine, push(1.0, 5 - layer), push(3e38, layer))
        innocent, faulty = await asyncio.gather(
            generate(engine, checks.prompt_of(2), max_tokens=6),
            generate(engine, checks.prompt_of(3, 70), program, max_tokens=6), return_exceptions=True)
        assert not isinstance(innocent, BaseException), innocent
        checks.check_tokens(group, checks.prompt_of(2), innocent[0], [], steered=False)
        assert isinstance(faulty, SteeringOverflow), faulty
        assert faulty.param == "interventions[1]" and f"{site} of layer {layer}" in faulty.message
    # Replicas take turns, and each says what it did.
    mild = compiled(engine, push(1.0, 1), push(1.0, 4))
    found = await asyncio.gather(*(generate(engine, checks.prompt_of(3, 40), mild, max_tokens=4) for _ in range(4)))
    touched = [count for _, counts in found for count in counts]
    assert all((count.largest_step or 0) > 0 for count in touched)


async def test_scores(group: Group) -> None:
    await checks.scores_equal_hooks(group, checks.cases_of(group)[::4])


async def test_captures(group: Group) -> None:
    await checks.capture_is_what_hooks_see(group)


async def test_comparisons(group: Group) -> None:
    await checks.comparison_equals_two_plain_passes(group)


async def test_preemption(group: Group) -> None:
    await checks.preempted_requests_stay_right(group)
