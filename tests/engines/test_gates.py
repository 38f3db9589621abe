"""Gates on a real engine: a mixed batch, shared prefixes, and a gate per token against plain hooks."""

import asyncio
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engines.data import CaptureRequest
from server.requests.gates import decide
from server.requests.plan import Plan
from server.text.prompts import Prompt
from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.gates import Reading
from steering.language.intervention import Intervention
from steering.programs.compiler import compile_program
from tests.engines import reference as ref
from tests.engines.conftest import compiled, generate, ids

D = 32
PROMPTS = [[5 + (3 * t + n) % 80 for t in range(24)] for n in range(6)]
VECTOR = torch.randn(D, generator=torch.Generator().manual_seed(1)) * 4
WEIGHT = torch.randn(D, generator=torch.Generator().manual_seed(2))
ADD = {"op": "add", "layers": [1], "inline": {"vector": VECTOR.tolist()}}


def probe(threshold: float, layer: int = 1) -> Source:
    payload = Payload.build("probe", {layer: {"weight": WEIGHT, "bias": torch.tensor(0.0)}})
    return Source("probe@1", "d", payload, "add", "resid_post", reading=Reading(pool="last", threshold=threshold))


def gated(engine: Any, threshold: float, **gate: Any) -> Any:
    intervention = Intervention.model_validate({**ADD, "gate": {"probe": "probe", **gate}})
    return compile_program([Resolved(intervention, None, (probe(threshold),))], engine.facts)


async def test_a_mixed_batch(start_engine: Any, model_dir: Any) -> None:
    """Requests of one spec, half of them open: each says what it says alone, steered or untouched, cached or not."""
    engine = await start_engine("qwen3", share_prefixes=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = [model(input_ids=torch.tensor([p]), output_hidden_states=True).hidden_states[2][0, -1]
                  for p in PROMPTS]
    scores = [float(h @ WEIGHT) for h in hidden]
    threshold = sorted(scores)[len(scores) // 2] - 1e-3
    program = gated(engine, threshold)
    decided = await decide(Plan(program), [Prompt(p) for p in PROMPTS], engine)
    opens = [one.gates[0].open for one in decided]
    assert [one.gates[0].scores[0][1] for one in decided] == pytest.approx(scores, abs=1e-4)
    assert opens == [score > threshold for score in scores] and 0 < sum(opens) < len(opens)
    plain = compiled(engine, ADD)
    alone = [await generate(engine, p, plain if o else None) for p, o in zip(PROMPTS, opens, strict=True)]
    for _ in range(2):  # the second time from shared prefixes
        together = await asyncio.gather(*(generate(engine, p, one.program)
                                          for p, one in zip(PROMPTS, decided, strict=True)))
        for (tokens, touched), (expected, _), o in zip(together, alone, opens, strict=True):
            assert ids(tokens) == ids(expected)
            assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in expected], abs=1e-4)
            assert bool(touched[0].prompt) is o


@pytest.mark.parametrize("direction", ["above", "below"])
async def test_per_token_equals_hooks(start_engine: Any, model_dir: Any, direction: str) -> None:
    engine = await start_engine("qwen3")
    captured = (await engine.capture([CaptureRequest(PROMPTS[0], {"resid_post": [1]})]))[0]["resid_post"][1]
    middle = (captured @ WEIGHT).sort().values[11:13]
    threshold = float(middle.mean())
    program = gated(engine, threshold, when="token", direction=direction)
    tokens, _ = await generate(engine, PROMPTS[0], program)
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()
    held: list[torch.Tensor] = []

    def conditional(h: torch.Tensor) -> torch.Tensor:
        holds = (h @ WEIGHT > threshold) == (direction == "above")
        held.append(holds)
        return torch.where(holds[:, None], h + VECTOR, h)

    whole = PROMPTS[0] + ids(tokens)
    expected = ref.logprobs(model, whole, len(PROMPTS[0]), [ref.Edit("resid_post", 1, conditional, ref.everywhere)])
    assert 0 < int(held[0].sum()) < len(whole)
    rows = expected[len(PROMPTS[0]) - 1:-1]
    assert [t.logprob for t in tokens] == pytest.approx(
        [float(row[t.token_id]) for row, t in zip(rows, tokens, strict=True)], abs=1e-4)
