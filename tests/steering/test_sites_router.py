"""Routers of every mixture family: our selection against the stock gate, a slow oracle and models changed by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from steering.language.errors import UnsupportedModel, UnsupportedSite
from steering.models.describe import model_facts
from steering.models.routers import attach_router, router_rule
from steering.models.routing import FORCE_MARGIN, RouterRule, Routing, select
from steering.models.taps import attach, tap
from tests.tiny import MOE_FAMILIES, VOCAB_SIZE, tiny

torch.set_num_threads(1)

LENGTH = 13
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in MOE_FAMILIES),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("olmoe", {"norm_topk_prob": True}),
    ("deepseek_v2", {"topk_method": "greedy"}),
    ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
]
IDS = [f"{family}-{'-'.join(f'{k}={v}' for k, v in changes.items())}" for family, changes in VARIANTS]


@pytest.fixture(scope="module", params=VARIANTS, ids=IDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, changes = request.param
    return tiny(family, **changes)


@pytest.fixture
def layer(model: PreTrainedModel) -> int:
    return model_facts(model, model_id="tiny", fingerprint="").sites["router"][0]


def token_ids() -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(token_ids()).logits[0]


def routing_of(model: PreTrainedModel, layer: int) -> tuple[Tensor, Routing]:
    """Hidden states at the router and the stock routing of one forward pass."""
    seen: list[tuple[Tensor, Routing]] = []
    handle = attach_router(model, layer, lambda hidden, routing: seen.append((hidden, routing)))
    logits(model)
    handle.remove()
    return seen[0]


def mlp_out(model: PreTrainedModel, layer: int) -> Tensor:
    seen: list[Tensor] = []

    def edit(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    handle = attach(model, "mlp_out", layer, edit)
    logits(model)
    handle.remove()
    return seen[0]


def oracle(row: Sequence[float], rule: RouterRule, bias: Sequence[float], forced: Sequence[bool]) -> dict[int, float]:
    """Expert -> weight for one token, step by step in plain Python."""
    biased = [a + b for a, b in zip(row, bias, strict=True)]
    experts = range(rule.num_experts)
    correction = rule.correction.tolist() if rule.correction is not None else [0.0] * rule.num_experts

    def score(z: Sequence[float]) -> list[float]:
        if rule.scoring == "sigmoid":
            return [0.0 if x == -math.inf else 1 / (1 + math.exp(-x)) for x in z]
        top = max(z)
        if top == -math.inf:
            return [0.0] * len(z)
        total = sum(math.exp(x - top) for x in z)
        return [math.exp(x - top) / total for x in z]

    plain = score(biased)
    size = rule.num_experts // rule.num_groups
    marks = []
    for group in range(rule.num_groups):
        members = sorted((plain[e] + correction[e] for e in range(group * size, (group + 1) * size)
                          if biased[e] != -math.inf), reverse=True)
        take = 1 if rule.group_score == "max" else 2
        marks.append(sum(members[:take]) if members else -math.inf)
    open_groups = sorted(range(rule.num_groups), key=lambda g: -marks[g])[:rule.top_groups]

    top = max(biased)
    lift = (top if top != -math.inf else 0.0) + FORCE_MARGIN
    lifted = [lift if forced[e] else biased[e] for e in experts]
    scores = score(lifted)
    chosen = [e for e in experts if forced[e]]
    rest = [e for e in experts if not forced[e] and biased[e] != -math.inf and e // size in open_groups]
    chosen += sorted(rest, key=lambda e: -(scores[e] + correction[e]))[:rule.top_k - len(chosen)]
    total = sum(scores[e] for e in chosen)
    return {e: scores[e] / (total if rule.normalise else 1.0) * rule.scale for e in chosen}


def as_dicts(routing: Routing) -> list[dict[int, float]]:
    """What each token really uses: expert -> weight, slots with weight 0 left out."""
    return [{int(e): float(w) for e, w in zip(experts, weights, strict=True) if w != 0.0}
            for experts, weights in zip(routing.experts, routing.weights, strict=True)]


RULES = [
    RouterRule(6, 2, normalise=True),
    RouterRule(6, 3),
    RouterRule(8, 3, num_groups=4, top_groups=2, scale=1.5, sorted=False),
    RouterRule(8, 3, scoring="sigmoid", normalise=True, epsilon=1e-20, scale=2.5, num_groups=4, top_groups=2,
               group_score="top2", correction=torch.tensor([.3, -.2, .1, 0, -.4, .25, .05, -.15]), sorted=False),
    RouterRule(8, 2, scoring="sigmoid", num_groups=2, top_groups=1, group_score="top2",
               correction=torch.tensor([.1, 0, .2, 0, -.1, .3, 0, -.3])),
]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rule=st.sampled_from(RULES))
def test_select_does_what_the_oracle_says(data: st.DataObject, rule: RouterRule) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    row = torch.randn(1, rule.num_experts, generator=generator) * 2
    biases = st.sampled_from([0.0, 0.0, 0.0, 0.7, -1.3, -math.inf])
    bias = data.draw(st.lists(biases, min_size=rule.num_experts, max_size=rule.num_experts))
    forced_set = data.draw(st.sets(st.integers(0, rule.num_experts - 1), max_size=rule.top_k))
    forced = [e in forced_set for e in range(rule.num_experts)]
    got = select(row, rule, logit_bias=torch.tensor([bias]), force=torch.tensor([forced]))
    assert got.logits is row and got.experts.shape == got.weights.shape == (1, rule.top_k)
    assert len(set(got.experts[0].tolist())) == rule.top_k
    assert as_dicts(got)[0] == pytest.approx(oracle(row[0].tolist(), rule, bias, forced), abs=1e-5)


def test_select_without_edits_is_the_stock_gate(model: PreTrainedModel, layer: int) -> None:
    _, stock = routing_of(model, layer)
    rule = router_rule(model, layer)
    for own in (select(stock.logits, rule),
                select(stock.logits, rule, logit_bias=torch.zeros_like(stock.logits)),
                select(stock.logits, rule, force=torch.zeros_like(stock.logits, dtype=torch.bool))):
        assert torch.equal(own.experts, stock.experts)
        assert torch.equal(own.weights, stock.weights) and own.weights.dtype == stock.weights.dtype


@torch.no_grad()
def test_select_is_the_stock_gate_in_bfloat16(model: PreTrainedModel, layer: int) -> None:
    half = tiny(model.config.model_type).to(torch.bfloat16)
    gate = tap(half, "router", layer).module
    x = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    stock = Routing(*gate(x))
    own = select(stock.logits, router_rule(half, layer))
    assert torch.equal(own.experts, stock.experts)
    assert torch.equal(own.weights, stock.weights) and own.weights.dtype == stock.weights.dtype


def test_none_leaves_everything_bit_identical(model: PreTrainedModel, layer: int) -> None:
    untouched = logits(model)
    handle = attach_router(model, layer, lambda hidden, routing: None)
    assert torch.equal(logits(model), untouched)
    handle.remove()
    handle = attach_router(model, layer, lambda hidden, routing: replace(routing))
    assert torch.equal(logits(model), untouched)
    handle.remove()


def test_router_sees_what_the_experts_see(model: PreTrainedModel, layer: int) -> None:
    hidden, stock = routing_of(model, layer)
    assert hidden.shape == (LENGTH, 32)
    assert stock.experts.dtype == torch.int64
    gate = tap(model, "router", layer).module
    torch.testing.assert_close(hidden @ gate.weight.T, stock.logits)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_block_output_under_edits_is_the_sum_by_hand(model: PreTrainedModel, layer: int, implementation: str) -> None:
    """Token by token: the oracle's experts, each expert's own MLP, plus what is shared, against the edited model."""
    model.set_experts_implementation(implementation)
    rule = router_rule(model, layer)
    hidden, stock = routing_of(model, layer)
    off, on, pushed = 1, 4, 2
    bias = torch.zeros_like(stock.logits)
    bias[:, off] = -math.inf
    bias[:, pushed] = 0.8
    force = torch.zeros_like(bias, dtype=torch.bool)
    force[::2, on] = True

    handle = attach_router(model, layer, lambda h, r: select(r.logits, rule, logit_bias=bias, force=force))
    got = mlp_out(model, layer)
    handle.remove()

    block = model.model.layers[layer].mlp
    experts = block.experts
    with torch.no_grad():
        for t in range(LENGTH):
            x = hidden[t]
            expected = torch.zeros(32)
            use = oracle(stock.logits[t].tolist(), rule, bias[t].tolist(), force[t].tolist())
            assert off not in use and (t % 2 or on in use)
            for e, weight in use.items():
                gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
                expected += weight * (experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
            if hasattr(block, "shared_experts"):
                expected += block.shared_experts(x)
            if hasattr(block, "shared_expert"):
                expected += torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
            torch.testing.assert_close(got[t], expected, rtol=1e-4, atol=1e-5)


UNGROUPED = [(family, changes) for family, changes in VARIANTS
             if not family.startswith("deepseek") or changes.get("topk_method") == "greedy"]


@pytest.mark.parametrize(("family", "changes"), UNGROUPED)
@pytest.mark.parametrize("off", [0, 3])
@torch.no_grad()
def test_off_equals_a_model_built_without_the_expert(family: str, changes: dict[str, Any], off: int) -> None:
    model, without = tiny(family, **changes), tiny(family, **changes)
    layers = model_facts(model, model_id="tiny", fingerprint="").sites["router"]
    for n in layers:
        mlp = without.model.layers[n].mlp
        keep = [e for e in range(mlp.gate.num_experts) if e != off]
        mlp.gate.weight = torch.nn.Parameter(mlp.gate.weight[keep])
        mlp.experts.gate_up_proj = torch.nn.Parameter(mlp.experts.gate_up_proj[keep])
        mlp.experts.down_proj = torch.nn.Parameter(mlp.experts.down_proj[keep])
        mlp.gate.num_experts = mlp.experts.num_experts = len(keep)
        own_rule = router_rule(model, n)

        def edit(hidden: Tensor, routing: Routing, rule: RouterRule = own_rule) -> Routing:
            bias = torch.zeros_like(routing.logits)
            bias[:, off] = -math.inf
            return select(routing.logits, rule, logit_bias=bias)

        attach_router(model, n, edit)
    assert float((logits(model) - logits(tiny(family, **changes))).abs().max()) > 1e-3
    torch.testing.assert_close(logits(model), logits(without), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [2.0, -1e9])
@torch.no_grad()
def test_correction_set_by_hand_equals_an_edit_of_deepseek_v3(bias: float) -> None:
    """A correction of -1e9 is never chosen, so it is `off`; one of +2 is always chosen, at its own weight."""
    expert, changes = 5, {"n_group": 2, "topk_group": 1}
    edited, by_hand = tiny("deepseek_v3", **changes), tiny("deepseek_v3", **changes)
    by_hand.model.layers[1].mlp.gate.e_score_correction_bias[expert] += bias
    rule = router_rule(edited, 1)

    def edit(hidden: Tensor, routing: Routing) -> Routing:
        if bias > 0:
            correction = rule.correction.clone()
            correction[expert] += bias
            return select(routing.logits, replace(rule, correction=correction))
        column = torch.zeros_like(routing.logits)
        column[:, expert] = -math.inf
        return select(routing.logits, rule, logit_bias=column)

    attach_router(edited, 1, edit)
    torch.testing.assert_close(logits(edited), logits(by_hand))
    assert float((logits(edited) - logits(tiny("deepseek_v3", **changes))).abs().max()) > 1e-4


def test_force_and_off_hold_for_every_token(model: PreTrainedModel, layer: int) -> None:
    _, stock = routing_of(model, layer)
    rule = router_rule(model, layer)
    usual = [set(d) for d in as_dicts(stock)]
    for expert in range(rule.num_experts):
        mark = torch.zeros_like(stock.logits, dtype=torch.bool)
        mark[:, expert] = True
        forced = as_dicts(select(stock.logits, rule, force=mark))
        assert all(expert in d for d in forced)
        best = [max(d.values()) for d in forced]
        assert [d[expert] for d in forced] == pytest.approx(best, rel=1e-6), "a forced expert weighs most"
        gone = as_dicts(select(stock.logits, rule, logit_bias=torch.where(mark, -math.inf, 0.0)))
        assert not any(expert in d for d in gone)
        for before, after in zip(usual, gone, strict=True):
            if expert not in before and rule.num_groups == 1:
                assert set(after) == before
    assert any(expert not in before for before in usual), "the test would see nothing"


def test_an_edited_token_leaves_the_others(model: PreTrainedModel, layer: int) -> None:
    untouched, rule = logits(model), router_rule(model, layer)

    def edit(hidden: Tensor, routing: Routing) -> Routing:
        bias = torch.zeros_like(routing.logits)
        bias[8, routing.experts[8, 0]] = -math.inf
        edited = select(routing.logits, rule, logit_bias=bias)
        others = torch.arange(LENGTH) != 8
        assert torch.equal(edited.experts[others], routing.experts[others])
        assert torch.equal(edited.weights[others], routing.weights[others])
        return edited

    handle = attach_router(model, layer, edit)
    steered = logits(model)
    handle.remove()
    torch.testing.assert_close(steered[:8], untouched[:8], rtol=1e-5, atol=1e-6)
    assert float((steered[8] - untouched[8]).abs().max()) > 1e-4


def test_weight_zero_leaves_the_slot_empty(model: PreTrainedModel, layer: int) -> None:
    """`off` without refill: the block's output loses exactly what the best expert gave."""
    hidden, stock = routing_of(model, layer)
    usual = mlp_out(model, layer)

    def edit(h: Tensor, routing: Routing) -> Routing:
        weights = routing.weights.clone()
        weights[:, 0] = 0.0
        return replace(routing, weights=weights)

    handle = attach_router(model, layer, edit)
    lost = usual - mlp_out(model, layer)
    handle.remove()
    experts = model.model.layers[layer].mlp.experts
    with torch.no_grad():
        for t in range(LENGTH):
            e = int(stock.experts[t, 0])
            gate, up = (experts.gate_up_proj[e] @ hidden[t]).chunk(2)
            gave = stock.weights[t, 0] * (experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
            torch.testing.assert_close(lost[t], gave, rtol=1e-3, atol=1e-5)


def test_logits_edited_at_the_router_site_choose_anew(model: PreTrainedModel, layer: int) -> None:
    rule = router_rule(model, layer)
    bias = torch.linspace(-1, 1, rule.num_experts)
    site = attach(model, "router", layer, lambda x: x + bias)
    by_site = logits(model)
    site.remove()
    router = attach_router(model, layer, lambda hidden, r: select(r.logits, rule, logit_bias=bias.expand_as(r.logits)))
    by_router = logits(model)
    router.remove()
    torch.testing.assert_close(by_site, by_router)
    assert float((by_site - logits(model)).abs().max()) > 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_with_every_expert_off_nothing_is_added(rule: RouterRule) -> None:
    logits = torch.randn(3, rule.num_experts)
    bias = torch.full_like(logits, -math.inf)
    nothing = select(logits, rule, logit_bias=bias)
    assert torch.equal(nothing.weights, torch.zeros(3, rule.top_k))
    force = torch.zeros_like(logits, dtype=torch.bool)
    force[:, 2] = True
    alone = select(logits, rule, logit_bias=bias, force=force)
    assert all(set(d) == {2} for d in as_dicts(alone)), "force beats off"


def test_a_dense_layer_has_no_router() -> None:
    model = tiny("deepseek_v3")
    for target, n in ((model, 0), (tiny("llama"), 0)):
        with pytest.raises(UnsupportedSite, match="no router"):
            router_rule(target, n)
        with pytest.raises(UnsupportedSite, match="no router"):
            attach_router(target, n, lambda hidden, routing: None)


def test_an_unknown_way_of_choosing_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="noaux_tc"):
        router_rule(tiny("deepseek_v2", topk_method="noaux_tc"), 1)
