"""What the compiled graph carries out, without vLLM: fused stages against the ops' own kernels, one after another."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from server.engines.vllm.manifest import STAGE_OPS, GraphOps
from server.engines.vllm.wire import Rows
from server.engines.vllm.worker.fuse import fuse
from server.engines.vllm.worker.stage import steered
from server.engines.vllm.worker.tables import GraphTables
from steering.acting.containment import UNLIMITED, StepLimit, contain
from steering.artifacts.source import Resolved
from steering.language.intervention import Intervention
from steering.models.describe import model_facts
from steering.ops.base import Row
from steering.programs.compiler import compile_program
from tests.engines.cases import dense_cases
from tests.steering.rows import after
from tests.tiny import tiny

D, RANK = 16, 4


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _unit(seed: int) -> torch.Tensor:
    vector = _normal(seed, D)
    return vector / vector.norm()


def _plane(seed: int) -> torch.Tensor:
    return torch.linalg.qr(_normal(seed, D, 2)).Q.T.contiguous()


def _signs(seed: int) -> torch.Tensor:
    return torch.sign(_normal(seed, D)) * (_normal(seed + 1, D) > 0)


MAKERS: dict[str, Callable[[int], Row]] = {
    "add": lambda s: Row("add", {"delta": _normal(s, D)}),
    "norm match": lambda s: Row("add_norm_match", {"delta": 0.7 * _unit(s)}),
    "preserve norm": lambda s: Row("add_preserve_norm", {"delta": _normal(s, D)}),
    "scale": lambda s: Row("scale_offset", {"scale": _normal(s, D), "offset": _normal(s + 1, D)}),
    "zero": lambda s: Row("scale_offset", {"scale": (_normal(s, D) > 0).float(), "offset": torch.zeros(D)}),
    "affine": lambda s: Row("affine", {"up": _normal(s, 2, D), "down": _normal(s + 1, 2, D),
                                       "bias": _normal(s + 2, 2)}),
    "ablate": lambda s: Row("affine", {"up": -_unit(s)[None], "down": _unit(s)[None], "bias": torch.zeros(1)}),
    "clamp": lambda s: Row("clamp", {"direction": _unit(s), "low": torch.tensor(-torch.inf),
                                     "high": torch.tensor(0.2), "amount": torch.tensor(0.8)}),
    "rotate by": lambda s: Row("rotate", {"plane": _plane(s), "cos": torch.tensor(0.6), "sin": torch.tensor(0.8),
                                          "absolute": torch.tensor(0.0), "adaptive": torch.tensor(1.0)}),
    "rotate to": lambda s: Row("rotate", {"plane": _plane(s), "cos": torch.tensor(0.6), "sin": torch.tensor(-0.8),
                                          "absolute": torch.tensor(1.0), "adaptive": torch.tensor(0.0)}),
    **{f"flip {mode}": lambda s, mode=mode: Row("sign_flip", {
        "polarity": _signs(s), "mode": torch.tensor(float(mode)), "count": torch.tensor(float(D)),
        "amount": torch.tensor(0.5)}) for mode in (0, 1, 2)},
}


def _tables(depth: int = 3, rank: int = RANK, slots: int = 4, rows: int = 256, **more: Any) -> GraphTables:
    tables = GraphTables(slots, num_rows=rows, depth=depth, rank=rank, max_tokens=64,
                         **{"dtype": torch.float32, "device": torch.device("cpu"), **more})
    tables.add_place(("resid_post", 0), D, elementwise=False, columns=slice(0, D))
    return tables


def _run(tables: GraphTables, h: torch.Tensor) -> torch.Tensor:
    return _measured(tables, h)[0]


def _measured(tables: GraphTables, h: torch.Tensor, dtype: torch.dtype = torch.float32
              ) -> tuple[torch.Tensor, torch.Tensor]:
    place = tables.places["resid_post", 0]
    number = tables.token[:len(h)]
    return steered(h, place.pool.tensor, place.index[number], place.scalars[number], tables.depth, tables.rank, False,
                   dtype, tables.limit)


def _one_after_another(h: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    for row in rows:
        h = after(row, h)
    return h


@pytest.mark.parametrize("names", [*itertools.product(MAKERS, MAKERS), ("add", "scale", "add"), ("add",) * 3,
                                   ("affine", "add", "ablate"), ("scale", "affine", "flip 0"),
                                   ("norm match", "add", "clamp")], ids="+".join)
def test_stages_equal_formulas_in_order(names: tuple[str, ...]) -> None:
    rows = [MAKERS[name](10 * i + 1) for i, name in enumerate(names)]
    tables = _tables()
    assert tables.place(2, Rows("x", tuple({("resid_post", 0): row} for row in rows), (0,) * len(rows)))
    tables.fill(tables.variants(2, np.array([0, 1, 0, 1, 1], dtype=np.uint32) * (2 ** len(rows) - 1)))
    h = _normal(99, 6, D)
    found = _run(tables, h)
    touched = torch.tensor([False, True, False, True, True, False])
    assert torch.equal(found[~touched], h[~touched]), "untouched tokens and padding must stay bit for bit"
    assert torch.allclose(found[touched], _one_after_another(h[touched], rows), atol=1e-4, rtol=1e-4)


def test_a_stack_is_as_many_stages_as_it_has_interventions() -> None:
    stack = [MAKERS["add"](n) for n in range(3)]
    assert fuse(stack, depth=2, rank=1) is None
    assert len(fuse(stack, depth=3, rank=1) or []) == 3


@pytest.mark.parametrize(("rows", "limits"), [
    (["clamp", "clamp"], {"depth": 1, "rank": 4}),
    (["affine"], {"depth": 1, "rank": 1}),
    (["add", "add"], {"depth": 1, "rank": 4}),
    (["ablate"], {"depth": 1, "rank": 4, "elementwise": True}),
    (["norm match"], {"depth": 1, "rank": 4, "elementwise": True}),
])
def test_what_does_not_fit_is_not_fused(rows: list[str], limits: dict[str, int]) -> None:
    assert fuse([MAKERS[name](n) for n, name in enumerate(rows)], **limits) is None


def test_sign_flips_of_the_largest_few_are_left_to_the_opaque_op() -> None:
    row = MAKERS["flip 0"](3)
    few = Row("sign_flip", {**row.tensors, "count": torch.tensor(1.0)})
    assert fuse([few], depth=1, rank=2) is None


def test_scopes_pick_interventions_token_by_token() -> None:
    first, second, third = (MAKERS["add"](n) for n in (1, 2, 3))
    tables = _tables()
    key = ("resid_post", 0)
    assert tables.place(1, Rows("x", ({key: first}, {key: second}, {key: third}), (0, 1, 0)))
    bits = np.array([0b101, 0b010, 0b111, 0], dtype=np.uint32)
    tables.fill(tables.variants(1, bits))
    h = _normal(5, 4, D)
    wanted = torch.stack([h[0] + first.tensors["delta"] + third.tensors["delta"], h[1] + second.tensors["delta"],
                          h[2] + sum(row.tensors["delta"] for row in (first, second, third)), h[3]])
    assert torch.allclose(_run(tables, h), wanted, atol=1e-5)


def test_too_many_scopes_go_elsewhere_and_leave_nothing() -> None:
    tables = _tables()
    key = ("resid_post", 0)
    rows = tuple({key: MAKERS["add"](n)} for n in range(4))
    assert not tables.place(1, Rows("x", rows, (0, 1, 2, 3)))
    assert tables.places[key].pool.num_free == 256


def test_rows_are_shared_counted_and_given_back() -> None:
    tables = _tables(rows=3)
    key = ("resid_post", 0)
    same, other = {key: MAKERS["add"](1)}, {key: MAKERS["scale"](2)}
    assert tables.place(1, Rows("a", (same,), (0,))) and tables.place(2, Rows("b", (same,), (0,)))
    assert tables.places[key].pool.num_free == 2
    assert tables.place(3, Rows("c", (other,), (0,)))
    assert tables.places[key].pool.num_free == 0
    # No room: nothing of it stays, and the others are untouched.
    assert not tables.place(4, Rows("d", ({key: MAKERS["add"](7)},), (0,)))
    tables.clear(1)
    assert tables.places[key].pool.num_free == 0
    tables.clear(2)
    assert tables.places[key].pool.num_free == 1
    assert tables.place(4, Rows("d", ({key: MAKERS["add"](7)},), (0,)))
    tables.fill(tables.variants(4, np.ones(2, dtype=np.uint32)))
    h = _normal(5, 2, D)
    assert torch.allclose(_run(tables, h), h + MAKERS["add"](7).tensors["delta"], atol=1e-6)
    tables.idle()
    assert torch.equal(_run(tables, h), h)


@pytest.mark.parametrize("form", ["vectors", "all"])
def test_the_ops_that_are_offered_in_the_graph_are_those_that_come_down_to_a_stage(form: GraphOps) -> None:
    model = tiny("qwen3")
    facts = model_facts(model, model_id="tiny", fingerprint="0" * 64)
    cases = dense_cases(facts.d_model, facts.d_ff, facts.num_heads, facts.head_dim, facts.num_layers)
    diagonal = {"scale": [2.0] * facts.d_model, "shift": [1.0] * facts.d_model}
    items = [item for spec, _ in cases for item in spec] + [{"op": "affine", "layers": [0], "inline": diagonal}]
    found = set()
    for item in items:
        rows = compile_program([Resolved(Intervention.model_validate(item))], facts).compiled[0].rows
        if any(fuse([row], depth=1, rank=RANK, elementwise=form == "vectors") for row in rows.values()):
            found.add(item["op"])
    assert found == set(STAGE_OPS[form])


@pytest.mark.parametrize("limit", [UNLIMITED, StepLimit(0.5), StepLimit(0.5, "clip")], ids=str)
def test_each_stage_is_contained_by_itself_and_named(limit: StepLimit) -> None:
    """A stack of three on one token, the last of them alone on another: steps, results and owners are those of
    `contain`, one after another; a token between them stays bit for bit."""
    key = ("resid_post", 0)
    rows = [Row("add", {"delta": torch.full((D,), value)}) for value in (3e38, 2.0, 1e-3)]
    tables = _tables(limit=limit)
    assert tables.place(1, Rows("x", tuple({key: row} for row in rows), (0, 0, 1)))
    numbers = tables.variants(1, np.array([0b111, 0, 0b100], dtype=np.uint32))
    tables.fill(numbers)
    h = _normal(5, 3, D)
    found, taken = _measured(tables, h)
    assert tables.owners[numbers].tolist() == [[0, 1, 2], [-1, -1, -1], [2, -1, -1]]
    assert torch.equal(found[1], h[1]) and bool(found.isfinite().all())
    expected, steps = h[:1], []
    for row in rows:
        expected, step = contain(expected, expected + row.tensors["delta"], limit)
        steps.append(float(step))
    assert steps[0] == math.inf
    assert torch.allclose(found[:1], expected, atol=1e-5)
    assert taken[0].tolist() == pytest.approx(steps, rel=1e-4)
    assert float(taken[2, 0]) == pytest.approx(1e-3 * math.sqrt(D) / float(h[2].norm()), rel=1e-3)
    assert taken[1].tolist() == [0.0] * 3


@pytest.mark.parametrize("limit", [UNLIMITED, StepLimit(0.5), StepLimit(0.5, "clip")], ids=str)
@pytest.mark.parametrize("elementwise", [True, False])
def test_stages_are_traced_whole(limit: StepLimit, elementwise: bool) -> None:
    """As vLLM traces them: in one piece, for any number of tokens, with nothing that looks at a value."""
    tables = _tables(limit=limit, depth=2)
    place = tables.places["resid_post", 0]
    columns = 4 if elementwise else place.index.shape[1]

    def run(h: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return steered(h, place.pool.tensor, place.index[number][:, :columns], place.scalars[number], 2, RANK,
                       elementwise, torch.bfloat16, limit)

    torch._dynamo.reset()
    traced = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for count in (5, 9):
        h, number = _normal(count, count, D), torch.zeros(count, dtype=torch.int32)
        for found, expected in zip(traced(h, number), run(h, number), strict=True):
            assert torch.equal(found, expected)


def test_what_the_streams_own_dtype_cannot_hold_is_no_step() -> None:
    key = ("resid_post", 0)
    tables = _tables(dtype=torch.float16)
    assert tables.place(1, Rows("x", ({key: Row("add", {"delta": torch.full((D,), 6e4)})},), (0,)))
    # What the table itself cannot hold is left to the opaque op, which has it in float32.
    assert not tables.place(2, Rows("y", ({key: Row("add", {"delta": torch.full((D,), 7e4)})},), (0,)))
    tables.fill(tables.variants(1, np.ones(2, dtype=np.uint32)))
    h = torch.stack([torch.full((D,), 6e4), torch.zeros(D)])
    found, taken = _measured(tables, h, torch.float16)
    assert torch.equal(found[0], h[0]) and float(taken[0, 0]) == math.inf
    assert bool((found[1] == found.new_tensor(6e4).half().float()).all())


def test_a_program_that_the_limit_does_not_hold_for_is_not_in_a_graph_that_has_one() -> None:
    key = ("resid_post", 0)
    rows = Rows("x", ({key: MAKERS["add"](1)},), (0,), limited=False)
    assert _tables().place(1, rows)
    assert not _tables(limit=StepLimit(2.0)).place(1, rows)
