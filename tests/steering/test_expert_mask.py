"""Expert masks over a mixed batch, against a router written here in numpy, one token at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from steering.acting.steerer import route_stages
from steering.artifacts.source import Resolved
from steering.language.intervention import Intervention
from steering.models.facts import ModelFacts
from steering.models.routing import RouterRule, Routing, select
from steering.ops import Place, get_operation
from steering.ops.expert_mask import ExpertMaskOptions
from steering.programs.compiler import compile_program
from steering.residency.bank import Bank
from steering.residency.plan import plan_step

torch.set_num_threads(1)

E, K = 8, 3
FACTS = ModelFacts("m", "f", "mixtral", num_layers=1, d_model=4, num_heads=1, head_dim=4, d_ff=4, vocab_size=9,
                   context_length=64, num_experts=E, experts_per_token=K, sites={"router": (0,)})
Mask = tuple[list[int], dict[str, Any], float]
RULES = [RouterRule(E, K, normalise=True), RouterRule(E, K), RouterRule(E, K, scoring="sigmoid", normalise=True,
                                                                        scale=2.5)]


def route(logits: np.ndarray, rule: RouterRule, masks: list[Mask]) -> dict[int, float]:
    """Expert -> weight of one token. All edits before the choice, then the choice, then the edits of weights."""
    z = logits.astype(np.float64).copy()
    off: set[int] = set()
    forced: set[int] = set()
    for experts, options, strength in masks:
        mode = options.get("mode", "off")
        off |= set(experts) if mode == "off_refill" else set()
        forced |= set(experts) if mode == "force" else set()
        if mode == "bias":
            z[experts] += strength * options.get("bias", 0.0)
    allowed = [e for e in range(E) if e not in off]
    if forced:
        z[sorted(forced)] = max(z[allowed]) + 0.01
    usable = sorted(set(allowed) | forced)
    if rule.scoring == "softmax":
        scores = {e: np.exp(z[e]) / sum(np.exp(z[u]) for u in usable) for e in usable}
    else:
        scores = {e: 1 / (1 + np.exp(-z[e])) for e in usable}
    ranking = sorted(usable, key=lambda e: (e not in forced, -scores[e]))
    # A sigmoid router gives equal scores to all experts of a high logit, and which of them it takes is left to chance.
    assume(len(ranking) == K or ranking[K] in forced or ranking[K - 1] in forced
           or scores[ranking[K - 1]] - scores[ranking[K]] > 1e-6 * scores[ranking[K]])
    weights = {e: scores[e] for e in ranking[:K]}
    if rule.normalise:
        total = sum(weights.values())
        weights = {e: w / total for e, w in weights.items()}
    weights = {e: w * rule.scale for e, w in weights.items()}
    for experts, options, strength in masks:
        mode = options.get("mode", "off")
        if mode in ("off", "scale"):
            target = 0.0 if mode == "off" else options.get("scale", 0.0)
            changed = {e: w * (1 + strength * (target - 1)) if e in experts else w for e, w in weights.items()}
            before, after = sum(weights.values()), sum(changed.values())
            again = options.get("renormalise", True) and after > 0
            weights = {e: w * before / after if again else w for e, w in changed.items()}
    return weights


def steered(logits: torch.Tensor, rule: RouterRule, requests: list[list[Mask]], dtype: torch.dtype = torch.float32
            ) -> tuple[Routing, Routing]:
    """Routing of one token per request before and after, all in one batch through bank, plan and stages."""
    bank = Bank(len(requests), torch.device("cpu"))
    slots, bits = [], []
    for masks in requests:
        program = compile_program([Resolved(Intervention.model_validate(
            {"op": "expert_mask", "layers": [0], "inline": {"experts": experts}, "options": options,
             "strength": strength})) for experts, options, strength in masks], FACTS)
        slots += bank.hold([program]) if masks else [0]
        bits.append(program.acting)
    before = select(logits.to(dtype), rule)
    plan = plan_step(bank, np.array(slots, dtype=np.int32), np.array(bits, dtype=np.uint32))
    stages = plan.get(("router", 0))
    return before, route_stages(before, stages, rule) if stages else before


def dense(routing: Routing) -> np.ndarray:
    return torch.zeros(len(routing.logits), E).scatter_add(1, routing.experts, routing.weights.float()).numpy()


def logits_of(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, E, generator=torch.Generator().manual_seed(seed)) * 2


_EXPERTS = st.lists(st.integers(0, E - 1), min_size=1, max_size=3, unique=True)
_MASKS = st.one_of(
    st.tuples(_EXPERTS, st.fixed_dictionaries({}, optional={"mode": st.just("off"), "renormalise": st.booleans()}),
              st.sampled_from([1.0, 0.5])),
    st.tuples(_EXPERTS, st.fixed_dictionaries({"mode": st.just("scale"), "scale": st.sampled_from([0.0, 0.3, 1.0,
                                                                                                   2.0])},
                                              optional={"renormalise": st.booleans()}), st.sampled_from([1.0, 0.5])),
    st.tuples(_EXPERTS, st.fixed_dictionaries({"mode": st.just("bias"), "bias": st.sampled_from([-3.0, 1.5, 50.0])}),
              st.sampled_from([1.0, -1.0])),
    st.tuples(_EXPERTS, st.just({"mode": "off_refill"}), st.just(1.0)),
    st.tuples(_EXPERTS, st.just({"mode": "force"}), st.just(1.0)))


def _sensible(masks: list[Mask]) -> bool:
    modes: dict[str, set[int]] = {}
    for experts, options, _ in masks:
        modes.setdefault(options.get("mode", "off"), set()).update(experts)
    return len(modes.get("force", ())) <= K and E - len(modes.get("off_refill", ())) >= K


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(_MASKS, max_size=3).filter(_sensible), min_size=1, max_size=6), st.integers(0, 99),
       st.sampled_from(RULES))
def test_mixed_batch_equals_numpy(requests: list[list[Mask]], seed: int, rule: RouterRule) -> None:
    logits = logits_of(seed, len(requests))
    before, after = steered(logits, rule, requests)
    found = dense(after)
    for t, masks in enumerate(requests):
        wanted = np.zeros(E)
        for e, w in route(logits[t].numpy(), rule, masks).items():
            wanted[e] = w
        np.testing.assert_allclose(found[t], wanted, rtol=2e-4, atol=1e-5)
        if not masks:
            assert torch.equal(after.weights[t], before.weights[t])
            assert torch.equal(after.experts[t], before.experts[t])


@pytest.mark.parametrize("rule", RULES, ids=["normalised", "plain", "sigmoid"])
def test_off_leaves_the_slot_empty_and_keeps_the_sum(rule: RouterRule) -> None:
    logits = logits_of(1, 20)
    first = select(logits, rule).experts[:, 0].tolist()
    before, after = steered(logits, rule, [[([e], {}, 1.0)] for e in first])
    assert torch.equal(after.experts, before.experts), "nothing may take the place"
    found = dense(after)
    assert all(found[t, e] == 0 for t, e in enumerate(first))
    torch.testing.assert_close(after.weights.sum(-1), before.weights.sum(-1))
    # Without renormalising the others stay as they were, bit for bit.
    _, bare = steered(logits, rule, [[([e], {"renormalise": False}, 1.0)] for e in first])
    assert torch.equal(bare.weights[:, 1:], before.weights[:, 1:])


def test_off_of_all_chosen_experts_gives_nothing() -> None:
    logits = logits_of(2, 1)
    chosen = select(logits, RULES[0]).experts[0].tolist()
    _, after = steered(logits, RULES[0], [[(chosen, {}, 1.0)]])
    assert after.weights.tolist() == [[0.0] * K]


def test_refill_takes_the_next_best() -> None:
    logits = logits_of(3, 20)
    ranking = logits.argsort(descending=True)
    _, after = steered(logits, RULES[0], [[([int(r[1])], {"mode": "off_refill"}, 1.0)] for r in ranking])
    for t, r in enumerate(ranking.tolist()):
        assert sorted(after.experts[t].tolist()) == sorted([r[0], r[2], r[3]])
        kept = logits[t, [r[0], r[2], r[3]]].softmax(-1)
        assert dense(after)[t, [r[0], r[2], r[3]]] == pytest.approx(kept.tolist(), rel=1e-4)


def test_forced_experts_are_chosen_and_heaviest() -> None:
    logits = logits_of(4, 20)
    worst = logits.argmin(-1).tolist()
    before, after = steered(logits, RULES[0], [[([e], {"mode": "force"}, 1.0)] for e in worst])
    for t, e in enumerate(worst):
        assert e not in before.experts[t].tolist()
        assert after.experts[t].tolist()[int(after.weights[t].argmax())] == e


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=["normalised", "plain", "sigmoid"])
@pytest.mark.parametrize("options", [{"mode": "scale", "scale": 1.0}, {"mode": "scale", "scale": 1.0,
                                                                       "renormalise": False},
                                     {"mode": "bias", "bias": 0.0}])
def test_scale_1_and_bias_0_are_exact(options: dict[str, Any], rule: RouterRule, dtype: torch.dtype) -> None:
    """Also in a batch with a request that does something."""
    logits = logits_of(5, 6)
    every = list(range(E))
    before, after = steered(logits, rule, [[(every, options, 1.0)]] * 5 + [[([0], {"mode": "force"}, 1.0)]], dtype)
    assert after.weights.dtype == before.weights.dtype
    assert torch.equal(after.weights[:5], before.weights[:5])
    assert torch.equal(after.experts[:5], before.experts[:5])


def test_bias_is_an_edit_of_the_logit() -> None:
    logits = logits_of(6, 8)
    _, after = steered(logits, RULES[1], [[([2, 5], {"mode": "bias", "bias": 1.5}, 2.0)]] * 8)
    shifted = logits.clone()
    shifted[:, [2, 5]] += 3.0
    np.testing.assert_allclose(dense(after), dense(select(shifted, RULES[1])), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"renormalise": False}, {"mode": "off_refill"}, {"mode": "force"},
                                     {"mode": "scale", "scale": 0.4}, {"mode": "bias", "bias": -2.0}], ids=str)
def test_reference_says_the_same(options: dict[str, Any]) -> None:
    logits = logits_of(7, 10)
    operation = get_operation("expert_mask")
    plain = operation.reference(logits, {"experts": torch.tensor([1, 6])}, ExpertMaskOptions.model_validate(options),
                                Place(FACTS, "router", 0, 1.0))
    _, after = steered(logits, RULES[0], [[([1, 6], options, 1.0)]] * 10)
    np.testing.assert_allclose(dense(after), plain.numpy(), rtol=1e-4, atol=1e-6)
