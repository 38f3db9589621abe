"""What a step may be: against the definition in double precision, and at the edges of each number format."""

import math

import numpy as np
import pytest
import torch

from steering.acting.containment import UNLIMITED, Fault, StepLimit, contain, fault_error
from steering.acting.steerer import measured_route
from steering.language.errors import SteeringLimit, SteeringOverflow
from steering.language.scope import Scope
from steering.models.routing import RouterRule, Routing
from steering.ops.base import Row
from steering.ops.kernel import get_kernel
from steering.programs.program import Applied, Compiled, Program
from steering.residency.bank import Bank
from steering.residency.plan import plan_step

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan


def rows(count: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [UNLIMITED, StepLimit(1e4), StepLimit(1e4, "clip")])
def test_a_step_that_fits_is_carried_out_bit_for_bit(dtype: torch.dtype, limit: StepLimit) -> None:
    before = rows(5, 0, dtype)
    wanted = before.float() + rows(5, 1, torch.float32)
    after, step = contain(before, wanted, limit)
    assert after.dtype == dtype
    if limit.action == "refuse":
        assert torch.equal(after, wanted.to(dtype))
    else:
        torch.testing.assert_close(after, wanted.to(dtype))
    exact = (wanted.to(dtype).double() - before.double()).norm(dim=-1) / before.double().norm(dim=-1)
    torch.testing.assert_close(step.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [UNLIMITED, StepLimit(10.0)])
@pytest.mark.parametrize("wrong", [INF, -INF, NAN, 3e38])
def test_a_row_that_leaves_the_format_keeps_its_value(dtype: torch.dtype, limit: StepLimit, wrong: float) -> None:
    """3e38 fits two of the formats, and its square none: the norms of the next layer would overflow."""
    before = rows(3, 0, dtype)
    wanted = before.float() + 0.5
    wanted[1, 2] = wrong
    after, step = contain(before, wanted, limit)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[[0, 2]], wanted[[0, 2]].to(dtype))
    assert np.isposinf(step[1].item()) and bool(step[[0, 2]].isfinite().all())


def test_the_format_of_the_model_counts() -> None:
    before = torch.zeros(1, 8) + 1
    assert math.isfinite(contain(before, before + 70_000)[1].item())
    assert math.isinf(contain(before.half(), before + 70_000)[1].item())


def test_rows_that_were_zero_or_not_finite_before() -> None:
    before = torch.zeros(4, 8)
    before[1, 0], before[2, 0] = NAN, INF
    wanted = torch.ones(4, 8)
    wanted[3, 0] = INF
    for limit in (UNLIMITED, StepLimit(10.0)):
        after, step = contain(before, wanted, limit)
        assert torch.equal(after[0], wanted[0]) and step[0] == 0
        # Not the op's doing, and nothing of it is made good here.
        assert bool(step[1:3].isnan().all()) and torch.equal(after[1:3].isfinite(), before[1:3].isfinite())
        assert torch.equal(after[3], before[3]) and np.isposinf(step[3].item())


def test_refused_and_clipped() -> None:
    before, direction = torch.ones(2, 8), torch.arange(8.0)
    wanted = torch.stack([before[0] + 100 * direction, before[1] + 0.01 * direction])
    after, step = contain(before, wanted, StepLimit(3.0))
    assert torch.equal(after, torch.stack([before[0], wanted[1]])) and step[0] > 3
    clipped, asked = contain(before, wanted, StepLimit(3.0, "clip"))
    assert torch.equal(asked, step)
    expected = before[0] + 3 * before[0].norm() * direction / direction.norm()
    torch.testing.assert_close(clipped[0], expected)
    torch.testing.assert_close(clipped[1], wanted[1])


def test_a_gate_whose_score_overflows_is_no_closed_gate() -> None:
    row = {"delta": torch.ones(2, 8), "gate_weight": torch.full((2, 8), 3e38), "gate_bias": torch.zeros(2)}
    before = torch.tensor([[1e-30] * 8, [4.0, -4.0] * 4])
    after, step = contain(before, get_kernel("gated:add")(before, row))
    assert torch.equal(after[0], before[0] + 1)
    assert torch.equal(after[1], before[1]) and np.isposinf(step[1].item())


def test_weights_of_experts_that_leave_the_format_are_kept() -> None:
    bank, blank = Bank(1, torch.device("cpu")), Applied(None, "expert_mask", (), (), {}, {})
    gate = torch.tensor([3e38, 1.0, 1.0, 1.0])
    row = Row("route", {"bias": torch.zeros(4), "gate": gate, "force": torch.zeros(4),
                        "renormalise": torch.tensor(0.0)})
    (slot,) = bank.hold([Program((Compiled("expert_mask", Scope(), {("router", 0): row}, blank),))])
    stages = plan_step(bank, np.array([slot, slot], dtype=np.int32), np.ones(2, dtype=np.uint32))["router", 0]
    before = Routing(torch.zeros(2, 4), torch.tensor([[2.0, 0.5], [0.5, 0.5]]), torch.tensor([[0, 1], [2, 3]]))
    after, (step,) = measured_route(before, stages, RouterRule(num_experts=4, top_k=2))
    assert torch.equal(after.weights, before.weights)
    assert np.isposinf(step[0].item()) and bool(step[1].isnan())


def test_the_error_says_what_where_and_which() -> None:
    program = Program((Compiled("add", Scope(), {}, Applied("one@2", "add", (), (), {}, {})),))
    error = fault_error(program, Fault(0, "resid_post", 3, 12, INF))
    assert isinstance(error, SteeringOverflow)
    assert error.message == ("intervention 0 (add of one@2) makes values that are not finite (resid_post of layer 3, "
                             "token 12)")
    limited = fault_error(program, Fault(0, "resid_post", 3, 12, 1.5e9), StepLimit(1e4))
    assert isinstance(limited, SteeringLimit)
    assert "by 1.5e+09 times its own norm" in limited.message and "allows 10000" in limited.message
    behind = fault_error(program, Fault(0, None, 4, 12, INF, behind=True))
    assert "drives the model to values that are not finite" in behind.message and "layer 4" in behind.message
    assert {e.param for e in (error, limited, behind)} == {"interventions[0]"}
