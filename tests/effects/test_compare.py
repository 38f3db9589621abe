"""The engine's comparisons against plain Hugging Face hooks: one, two and three stacked interventions, on tiny models
and on both lab models."""

import threading
from typing import Any

import pytest
import torch
from scipy.special import rel_entr
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab import MODEL_NAMES, model_path
from server.engines.data import CompareRequest, Comparison
from server.engines.transformers import comparing as embedded
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


# Spec, site, layer, which random vector, edit, tokens. The second halves, on generated tokens, what the first added.
LAB_STACK: list[tuple[dict[str, Any], str, int, int, Any, Any]] = [
    ({"op": "add", "layers": [3], "strength": {"value": 200.0, "unit": "unit"}}, "resid_post", 3, 0,
     lambda v: ref.add(200 * v / v.norm()), ref.everywhere),
    ({"op": "ablate", "layers": [3], "strength": 0.5, "scope": {"prompt": "none"}}, "resid_post", 3, 0,
     lambda v: ref.project_out((v / v.norm() * 0.5**0.5)[None]), ref.generated_only),
    ({"op": "add", "layers": [1], "site": "mlp_out", "strength": {"value": 120.0, "unit": "unit"},
      "scope": {"prompt": {"positions": [-1]}, "generation": "all"}}, "mlp_out", 1, 1,
     lambda v: ref.add(120 * v / v.norm()), ref.last_prompt_and_generated),
]


async def test_divergences_are_computed_off_the_event_loop(start_engine: Any,  # noqa: F811
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start_engine("qwen3")
    threads: list[int] = []
    for name in ("compared", "residual_shift"):
        work = getattr(embedded, name)

        def noted(*arguments: Any, work: Any = work) -> Any:
            threads.append(threading.get_ident())
            return work(*arguments)

        monkeypatch.setattr(embedded, name, noted)
    program = compiled(engine, *(spec for spec, _ in STACK[:2]))
    await engine.compare(CompareRequest(PROMPT * 2, len(PROMPT), program))
    assert len(threads) == 4, "in all, the shift, and one for each intervention left out"
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("name", MODEL_NAMES)
async def test_compare_equals_hooks_on_the_lab_models(start_engine: Any, name: str) -> None:  # noqa: F811
    """KL both ways, entropies, surprise, rank, agreement, residual shift and every share, for one to three."""
    path = str(model_path(name))
    engine = await start_engine(name, model=path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text)["input_ids"] for text in (
        "Review: I visited the museum on Monday.", "Once there was a fox in the garden, and Anna saw it. The fox")]
    last = model.config.num_hidden_layers - 1
    draws = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(11))
    given = [({**spec, "inline": {"vector": draws[n].tolist()}}, ref.Edit(site, layer, edit(draws[n]), touched))
             for spec, site, layer, n, edit, touched in LAB_STACK]
    for depth in (1, 2, 3):
        program = compiled(engine, *(spec for spec, _ in given[:depth]))
        edits = [edit for _, edit in given[:depth]]
        requests = []
        for n, prompt in enumerate(prompts):
            tokens, _ = await generate(engine, prompt, program, max_tokens=16, temperature=1.0, seed=n)
            requests.append(CompareRequest(prompt + ids(tokens), len(prompt), program))
        both = await engine.compare_all(requests)
        for request, found in zip(requests, both, strict=True):
            alone = await engine.compare(request)
            assert found.total.kl.tolist() == pytest.approx(alone.total.kl.tolist(), abs=1e-4)
            check_against_hooks(model, request, edits, found, last)


def check_against_hooks(model: Any, request: CompareRequest, edits: list[ref.Edit], found: Comparison,
                        last: int) -> None:
    whole, prompt = list(request.token_ids), request.prompt_length
    rows, chosen = slice(prompt - 1, -1), torch.tensor(whole[prompt:])

    def run(acting: list[ref.Edit]) -> tuple[torch.Tensor, torch.Tensor]:
        kept: list[torch.Tensor] = []

        def keep(h: torch.Tensor) -> torch.Tensor:
            kept.append(h)
            return h

        logprobs = ref.logprobs(model, whole, prompt, [*acting, ref.Edit("resid_post", last, keep, ref.everywhere)])
        return logprobs[rows].double(), kept[0][rows].double()

    steered, hidden = run(edits)
    base, base_hidden = run([])
    parts = [base] if len(edits) == 1 else [run(edits[:i] + edits[i + 1:])[0] for i in range(len(edits))]
    assert len(found.without) == len(edits)
    for measured, other in zip((found.total, *found.without), (base, *parts), strict=True):
        p, q = steered.exp().numpy(), other.exp().numpy()
        own = other.gather(1, chosen[:, None])
        for name, expected in {
            "kl": rel_entr(p, q).sum(-1), "reverse_kl": rel_entr(q, p).sum(-1),
            "entropy": -(steered.exp() * steered).sum(-1).numpy(),
            "other_entropy": -(other.exp() * other).sum(-1).numpy(), "surprise": -own[:, 0].numpy(),
            "rank": (other > own).sum(-1).double().numpy(),
            "top1_agree": (p.argmax(-1) == q.argmax(-1)).astype(float),
        }.items():
            assert getattr(measured, name).numpy() == pytest.approx(expected, abs=1e-4), name
    assert found.total.kl.max() > 0.05 and all(part.kl.max() > 1e-3 for part in found.without)
    moved = ((hidden - base_hidden).norm(dim=-1) / base_hidden.norm(dim=-1)).numpy()
    assert found.residual.relative.numpy() == pytest.approx(moved, rel=1e-4)
    assert found.residual.cosine.numpy() == pytest.approx(
        torch.nn.functional.cosine_similarity(hidden, base_hidden, dim=-1).numpy(), abs=1e-5)


async def test_an_intervention_that_does_nothing_has_no_share(start_engine: Any) -> None:  # noqa: F811
    engine = await start_engine("qwen3")
    idle = {"op": "add", "layers": [2], "inline": {"vector": W.tolist()}, "scope": {"prompt": "none", "generation": {
        "windows": [[400, 401]]}}}
    program = compiled(engine, STACK[0][0], idle)
    tokens, _ = await generate(engine, PROMPT, program, max_tokens=9)
    found = await engine.compare(CompareRequest(PROMPT + ids(tokens), len(PROMPT), program))
    assert float(found.without[1].kl.max()) == 0.0
    assert found.without[0].kl.tolist() == pytest.approx(found.total.kl.tolist(), abs=1e-6)
