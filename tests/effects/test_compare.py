"""The engine's comparisons against plain Hugging Face hooks: one, two and three stacked interventions."""

from typing import Any

import pytest
import torch
from scipy.special import rel_entr
from transformers import AutoModelForCausalLM

from server.engines.base import CompareRequest
from tests.engines import reference as ref
from tests.engines.conftest import compiled, generate, ids, model_dir, start_engine  # noqa: F401

PROMPT = [5 + (3 * t) % 80 for t in range(14)]


def vector(seed: int) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 3


V, U, W = vector(1), vector(2), vector(3)
STACK = [
    ({"op": "add", "layers": [1], "inline": {"vector": V.tolist()}},
     ref.Edit("resid_post", 1, ref.add(V), ref.everywhere)),
    ({"op": "ablate", "layers": [1], "inline": {"vector": U.tolist()}},
     ref.Edit("resid_post", 1, ref.project_out((U / U.norm())[None]), ref.everywhere)),
    ({"op": "add", "layers": [0], "inline": {"vector": W.tolist()}, "scope": {"prompt": "none"}},
     ref.Edit("resid_post", 0, ref.add(W), ref.generated_only)),
]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_compare_equals_hooks(start_engine: Any, model_dir: Any, family: str, depth: int) -> None:  # noqa: F811
    engine = await start_engine(family)
    program = compiled(engine, *(spec for spec, _ in STACK[:depth]))
    tokens, _ = await generate(engine, PROMPT, program, max_tokens=9)
    whole = PROMPT + ids(tokens)
    found = await engine.compare(CompareRequest(whole, len(PROMPT), program))

    model = AutoModelForCausalLM.from_pretrained(model_dir(family), dtype=torch.float32).eval()
    edits = [edit for _, edit in STACK[:depth]]
    rows = slice(len(PROMPT) - 1, -1)

    def logprobs(chosen: list[ref.Edit]) -> torch.Tensor:
        return ref.logprobs(model, whole, len(PROMPT), chosen)[rows].double()

    steered, base = logprobs(edits), logprobs([])
    others = [base] if depth == 1 else [logprobs(edits[:i] + edits[i + 1:]) for i in range(depth)]
    for measured, other in zip((found.total, *found.without), (base, *others), strict=True):
        expected = rel_entr(steered.exp().numpy(), other.exp().numpy()).sum(-1)
        assert measured.kl.numpy() == pytest.approx(expected, abs=1e-4)
        backwards = rel_entr(other.exp().numpy(), steered.exp().numpy()).sum(-1)
        assert measured.reverse_kl.numpy() == pytest.approx(backwards, abs=1e-4)
        assert measured.other_entropy.numpy() == pytest.approx((-other.exp() * other).sum(-1).numpy(), abs=1e-4)
    assert found.total.entropy.numpy() == pytest.approx((-steered.exp() * steered).sum(-1).numpy(), abs=1e-4)
    assert found.total.kl.max() > 0.05
    assert found.residual.relative.min() > 0
    assert len(found.without) == depth


async def test_an_intervention_that_does_nothing_has_no_share(start_engine: Any) -> None:  # noqa: F811
    engine = await start_engine("qwen3")
    idle = {"op": "add", "layers": [2], "inline": {"vector": W.tolist()}, "scope": {"prompt": "none", "generation": {
        "windows": [[400, 401]]}}}
    program = compiled(engine, STACK[0][0], idle)
    tokens, _ = await generate(engine, PROMPT, program, max_tokens=9)
    found = await engine.compare(CompareRequest(PROMPT + ids(tokens), len(PROMPT), program))
    assert float(found.without[1].kl.max()) == 0.0
    assert found.without[0].kl.tolist() == pytest.approx(found.total.kl.tolist(), abs=1e-6)
