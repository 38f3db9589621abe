"""Many programs in one batch, grouped by row: every op against numpy, tokens alone, memory, and pools that grow."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile

from steering.acting.steerer import apply_stage
from steering.language.scope import Scope
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from steering.ops import Place, Row, get_kernel, get_operation
from steering.ops.segments import Segments, product
from steering.programs.program import Applied, Compiled, Program
from steering.residency.bank import Bank
from steering.residency.plan import plan_step
from tests.steering import test_ops as plainly
from tests.steering.test_ops import Array, Formula, stacked, tensors_of

torch.set_num_threads(1)

CPU = torch.device("cpu")
WIDTH, RANK, PROGRAMS, TOKENS = 96, 64, 24, 150
FACTS = ModelFacts("m", "f", "llama", num_layers=1, d_model=WIDTH, num_heads=plainly.HEADS, head_dim=plainly.HEAD_DIM,
                   d_ff=WIDTH, vocab_size=50, context_length=64)
Make = Callable[[np.random.Generator], dict[str, Array]]


def _space(g: np.random.Generator) -> dict[str, Array]:
    return {"basis": np.linalg.qr(g.normal(size=(WIDTH, RANK)))[0].T, "mean": g.normal(size=WIDTH)}


def _plane(g: np.random.Generator) -> dict[str, Array]:
    return {"basis": np.linalg.qr(g.normal(size=(WIDTH, 2)))[0].T}


def _affine(g: np.random.Generator) -> dict[str, Array]:
    # Of a length at which one op moves a token by about its own norm.
    return {"up": g.normal(size=(RANK, WIDTH)) / 8, "down": g.normal(size=(RANK, WIDTH)) / 8,
            "bias": g.normal(size=RANK)}


def _vector(g: np.random.Generator) -> dict[str, Array]:
    return {"vector": g.normal(size=WIDTH)}


def _curve(g: np.random.Generator) -> dict[str, Array]:
    angle = np.arange(6.0)
    turns = np.stack([np.cos(angle * (k + 1) / 7) for k in range(RANK)], axis=1)
    return {**_space(g), "knots": angle[:, None], "points": turns * 3, "period": np.zeros(1)}


def _pattern(g: np.random.Generator) -> dict[str, Array]:
    return {"dims": g.choice(WIDTH, 64, replace=False), "polarity": g.choice([-1, 1], 64)}


def _dims(g: np.random.Generator) -> dict[str, Array]:
    return {"dims": g.choice(WIDTH, 64, replace=False), "value": g.normal(size=64)}


def _heads(g: np.random.Generator) -> dict[str, Array]:
    return {"heads": g.choice(plainly.HEADS, 2, replace=False)}


CASES: list[tuple[Op, dict[str, Any], Make, Formula, Site]] = [
    ("affine", {}, _affine, plainly.low_rank, "resid_post"),
    ("ablate", {}, lambda g: {"basis": _space(g)["basis"]}, plainly.ablate_subspace, "resid_post"),
    ("patch", {}, _space, plainly.patched(None), "resid_post"),
    ("patch", {"basis_rank": 33}, _space, plainly.patched(33), "resid_post"),
    ("manifold", {"target": 4, "fraction": 0.6}, _curve, plainly.swapped(plainly.along(None, 4, 0.6)), "resid_post"),
    ("manifold", {"target": 4, "source": 0, "fraction": 0.3}, _curve, plainly.swapped(plainly.along(0, 4, 0.3)),
     "resid_post"),
    ("manifold", {"target": 4, "keep_offset": True}, _curve, plainly.swapped(plainly.carried(4, 1)), "resid_post"),
    ("rotate", {"angle": 75}, _plane, plainly.rotate_to(75), "resid_post"),
    ("rotate", {"angle": 75, "mode": "by", "adaptive": True}, _plane, plainly.rotate_by(75, True), "resid_post"),
    ("add", {}, _vector, plainly.add_plain, "resid_post"),
    ("add", {"norm_match": True}, _vector, plainly.add_norm_match, "resid_post"),
    ("clamp", {"min": -0.3, "max": 0.6}, _vector, plainly.clamp_between(-0.3, 0.6), "resid_post"),
    ("ablate", {}, _vector, plainly.ablate_vector, "resid_post"),
    ("sign_flip", {"mode": "flip", "fraction": 0.3}, _pattern, plainly.signs("flip", "3/10"), "resid_post"),
    ("mask", {"mode": "set"}, _dims, plainly.columns("dims", lambda x, n: n["value"]), "resid_post"),
    ("head_mask", {}, _heads, plainly.heads(0.0), "head_out"),
]


def programs_of(bank: Bank, rows: list[Row], site: Site = "resid_post") -> Array:
    blank = Applied(None, "add", (), (), {}, {})
    programs = [Program((Compiled("add", Scope(), {(site, 0): row}, blank),)) for row in rows]
    return np.array(bank.hold(programs), dtype=np.int32)


def steered(bank: Bank, slots: Array, h: torch.Tensor, site: Site = "resid_post") -> torch.Tensor:
    for stage in plan_step(bank, slots, np.ones(len(slots), dtype=np.uint32)).get((site, 0), []):
        h = apply_stage(h, stage)
    return h


@pytest.mark.parametrize(("op", "options", "make", "formula", "site"), CASES,
                         ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)])
def test_many_programs_in_one_batch_equal_numpy(op: Op, options: dict[str, Any], make: Make, formula: Formula,
                                                site: Site) -> None:
    """24 programs and untouched tokens, 150 tokens in no order, segments of 1 to about 15 tokens; and each token gets
    the same alone."""
    g = np.random.default_rng(5)
    numbers = [make(g) for _ in range(PROGRAMS)]
    operation = get_operation(op)
    parsed = operation.options.model_validate(options)
    rows = [operation.row(tensors_of(n), parsed, Place(FACTS, site, 0, 1.0)) for n in numbers]
    bank = Bank(PROGRAMS, CPU)
    of_program = programs_of(bank, rows, site)
    chosen = np.minimum(g.exponential(6, size=TOKENS).astype(int), PROGRAMS) - 1
    chosen[:PROGRAMS] = np.arange(PROGRAMS)
    slots = np.where(chosen < 0, 0, of_program[chosen]).astype(np.int32)
    h = torch.tensor(g.normal(size=(TOKENS, FACTS.width(site))), dtype=torch.float32)
    before = h.clone()
    found = steered(bank, slots, h, site)
    assert torch.equal(h, before), "the model's activation was written into"
    assert (chosen < 0).sum() > 5
    assert torch.equal(found[chosen < 0], h[chosen < 0]), "an untouched token changed"
    touched = np.flatnonzero(chosen >= 0)
    wanted = np.stack([formula(h[t].double().numpy(), numbers[chosen[t]], 1.0) for t in touched])
    np.testing.assert_allclose(found[touched].numpy(), wanted, rtol=1e-5, atol=3e-5)
    assert np.abs(wanted - h[touched].numpy()).max() > 1e-2, "the case acts on nothing"
    for t in touched[::7]:
        alone = steered(bank, slots[t:t + 1], h[t:t + 1], site)
        torch.testing.assert_close(alone[0], found[t], rtol=1e-5, atol=1e-5)


def _affine_rows(count: int, rank: int, width: int) -> list[Row]:
    g = torch.Generator().manual_seed(3)
    return [Row("affine", {"up": torch.randn(rank, width, generator=g), "down": torch.randn(rank, width, generator=g),
                           "bias": torch.randn(rank, generator=g)}) for _ in range(count)]


def _allocated(function: Callable[[], object]) -> int:
    """Bytes of all that is allocated while `function` runs, freed or not."""
    with profile(profile_memory=True) as made:
        function()
    return sum(max(event.self_cpu_memory_usage, 0) for event in made.events() if event.name == "[memory]" or
               event.self_cpu_memory_usage > 0)


@pytest.mark.parametrize("per_program", [1, 2, 16])
def test_memory_is_that_of_the_activation(per_program: int) -> None:
    """No copy of a matrix is made, neither of one for every token nor of one for every program; the form that copies
    them, as the control, is measured alike."""
    width, programs = 128, 32
    tokens = programs * per_program
    rows = _affine_rows(programs, RANK, width)
    bank = Bank(programs, CPU)
    slots = np.random.default_rng(1).permutation(np.repeat(programs_of(bank, rows), per_program))
    h = torch.randn(tokens, width)
    (stage,) = plan_step(bank, slots, np.ones(tokens, dtype=np.uint32))["resid_post", 0]
    activation, inner, matrices = (4 * n for n in (tokens * width, tokens * RANK, 2 * programs * RANK * width))
    # Both products, what is added to them, both norms, the change, the sorted tokens and the result.
    assert _allocated(lambda: apply_stage(h, stage)) < 12 * activation + 6 * inner + 2**16
    copying = get_kernel("affine")
    copied = _allocated(lambda: copying(h, stacked([rows[n % programs] for n in range(tokens)])))
    assert copied > per_program * matrices, "the control copies nothing, so nothing is measured"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_products_equal_numpy(rows: list[int], rank: int, width: int, is_up: bool) -> None:
    """Segments of any sizes at any places of a pool, dense or sparse, of widths that `grouped_mm` takes and others."""
    g = torch.Generator().manual_seed(len(rows))
    rows.sort()
    pool = torch.randn(41, rank, width, generator=g)
    matrices = pool if is_up else pool.transpose(1, 2)
    x = torch.randn(len(rows), matrices.shape[1], generator=g)
    found = product(x, matrices, Segments.of(np.array(rows), CPU))
    wanted = np.stack([x[n].double().numpy() @ matrices[row].double().numpy() for n, row in enumerate(rows)])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_pool_may_grow_between_the_plan_and_its_step() -> None:
    rows = _affine_rows(9, 4, 16)
    bank = Bank(9, CPU)
    slots = np.repeat(programs_of(bank, rows[:2]), 3)
    h = torch.randn(6, 16)
    (stage,) = plan_step(bank, slots, np.ones(6, dtype=np.uint32))["resid_post", 0]
    before, capacity = apply_stage(h, stage), stage.pool.capacity
    programs_of(bank, rows[2:])
    assert stage.pool.capacity > capacity
    assert torch.equal(apply_stage(h, stage), before)


def test_a_token_that_is_not_finite_stays_alone_in_its_segment() -> None:
    bank = Bank(3, CPU)
    slots = np.repeat(programs_of(bank, _affine_rows(3, RANK, WIDTH)), 5)
    h = torch.randn(15, WIDTH)
    before = steered(bank, slots, h)
    h[7] = torch.nan
    after = steered(bank, slots, h)
    others = [t for t in range(15) if t != 7]
    assert torch.equal(after[others], before[others])
    assert not bool(after[7].isfinite().any())
