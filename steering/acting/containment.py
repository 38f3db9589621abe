"""What an intervention does to a token, measured and contained where it acts.

One number for each token and intervention is enough: the **relative step** |h' - h| / |h|. It is infinite where the
result does not fit into the model's dtype; where it is over a limit, the step is refused or clipped. In both cases what
goes on is finite before the op returns, because in a packed batch one key that is NaN makes the attention scores of
every request NaN, and not only those of its own. The numbers are read when the step is over, so that nothing here
waits for the device.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from steering.language.errors import ModelOverflow, SteeringLimit, SteeringOverflow, TrimtabError
from steering.language.vocabulary import Site
from steering.programs.program import Program

LimitAction = Literal["refuse", "clip"]


@dataclass(frozen=True)
class StepLimit:
    """Largest relative step that is carried out, and what is done with a larger one. `largest` infinite: no limit.

    refuse: the token keeps its activation and the request is to be failed. clip: the step is shortened to the limit.
    """

    largest: float = math.inf
    action: LimitAction = "refuse"

    @classmethod
    def of(cls, largest: float, action: LimitAction) -> "StepLimit":
        """From settings, where 0 is no limit."""
        return cls(largest if largest > 0 else math.inf, action)


UNLIMITED = StepLimit()
LARGEST = torch.finfo(torch.float32).max


def contain(before: Tensor, after: Tensor, limit: StepLimit = UNLIMITED) -> tuple[Tensor, Tensor]:
    """What takes the place of `before [n, width]` when an op wants `after [n, width]` (float32), and each token's step.

    Returns:
        The rows in the dtype of `before`: `after`, or `before`, bit for bit, where the step is not finite or refused,
        or the shortened step. And `[n]` float32, the relative step as it was asked for: infinite where the step is
        not finite in that dtype (or too long to be squared in float32), NaN where `before` itself is not finite, 0
        where it is zero.
    """
    old = before.float()
    own = torch.linalg.vector_norm(old, dim=-1)
    asked = None
    if limit.action == "clip" and limit.largest < math.inf:
        change = after - old
        asked = _relative(torch.linalg.vector_norm(change, dim=-1), own)
        after = old + change * (limit.largest / asked.clamp_min(limit.largest)).unsqueeze(-1)
    moved = after.to(before.dtype)
    length = torch.linalg.vector_norm(moved.float() - old, dim=-1)
    if asked is None and before.device.type == "cpu" and not torch.compiler.is_compiling():
        # Nearly always every step is finite and within the limit. On a CPU that test costs less than what follows; code
        # in a compiled graph cannot branch on values.
        step = length / own
        # If one step is NaN the maximum is NaN, and a comparison with NaN is false.
        if len(step) and float(step.max()) <= min(limit.largest, LARGEST):
            return moved, step
    step = _relative(length, own)
    fits = step <= (LARGEST if asked is not None else min(limit.largest, LARGEST))
    if asked is not None:
        step = torch.where(fits & (asked > limit.largest), asked, step)
    return torch.where(fits.unsqueeze(-1), moved, before), step


def _relative(length: Tensor, own: Tensor) -> Tensor:
    length = length.nan_to_num(nan=math.inf, posinf=math.inf)
    return (length / own).masked_fill((own == 0) & (length < math.inf), 0.0)


@dataclass(frozen=True)
class Fault:
    """A step that was not carried out, or what it led to.

    step: the relative step, infinite where its result was not finite. behind: the step itself was finite, but what the
    model computed from it stopped being finite, in `layer`. position: of the token in prompt and completion.
    """

    intervention: int
    site: Site | None
    layer: int | None
    position: int
    step: float
    behind: bool = False


def fault_error(program: Program, fault: Fault, limit: StepLimit = UNLIMITED) -> TrimtabError:
    """The typed error of a faulty request. Its path is `("interventions", i)`, which the
    caller puts in the place of the request it came from."""
    item = program.compiled[fault.intervention]
    what = f"intervention {fault.intervention} ({item.op} of {item.applied.artifact or 'inline'})"
    layer = "" if fault.layer is None else f"layer {fault.layer}, "
    where = layer if fault.site is None else f"{fault.site} of {layer}"
    place = f"{where}token {fault.position}"
    param = ("interventions", fault.intervention)
    if fault.behind:
        return SteeringOverflow(f"{what} drives the model to values that are not finite ({place})", param=param,
                                fix="Lower the strength.")
    if math.isfinite(fault.step):
        return SteeringLimit(f"{what} moves a token by {fault.step:.3g} times its own norm ({place}); this server "
                             f"allows {limit.largest:g}", param=param, fix="Lower the strength.")
    return SteeringOverflow(f"{what} makes values that are not finite ({place})", param=param,
                            fix="Lower the strength.")


def for_comparison(program: Program, limit: StepLimit) -> Program:
    """A program of the server's own making, to compare with one that was carried out.

    Steps that are over the limit only because another intervention is left out are no reason to refuse it. They are
    clipped where the other's are.
    """
    return replace(program, limited=program.limited and limit.action == "clip")


def model_error(position: int, dtype: torch.dtype) -> ModelOverflow:
    """The error of a request whose tokens make the untouched model overflow."""
    return ModelOverflow(f"the model itself makes values that are not finite in {str(dtype).removeprefix('torch.')} "
                         f"(token {position}); this is not the steering's doing",
                         fix="Serve the model in bfloat16 or float32 (setting dtype).")
