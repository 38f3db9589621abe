"""Training of one sparse autoencoder, step by step, in a form that can be put away and gone on with.

TopK is that of Gao et al. 2024 (arXiv 2406.04093): the k largest pre-activations are kept, decoder rows have length 1,
and dead features, which were off for long, explain what the others leave unexplained in an auxiliary loss. JumpReLU is
that of Rajamanoharan et al. 2024 (arXiv 2407.14435): a threshold for each feature, trained through the jump by a
rectangle as wide as `WINDOW`, and the loss that aims at a mean number of active features. Its gradient goes to the
pre-activations as well, as Conerly et al. 2025 have it (Circuits Updates, January). An auxiliary loss leaves many
dead features under their thresholds, so there they begin anew as the errors of badly explained rows (Bricken et al.
2023, Towards Monosemanticity).

Gradient-aware choice is that of g-SAE (Olmo et al. 2024, arXiv 2411.10397): which features are kept goes by their size
and by how much the model's loss would feel them, and what they are is their size alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Activation = Literal["topk", "jumprelu"]
# Weight of the auxiliary loss, after Gao et al.
AUXILIARY = 1 / 32
# Steps for which a feature was active on no token before it counts as dead in training, and after how many those that
# do begin anew.
IDLE_STEPS, ANEW_STEPS = 50, 100
# Of JumpReLU, where activations have the root of the width as their length: the first threshold, how near to it
# pre-activations move it, and the weight of (active features / k - 1)^2.
THRESHOLD, WINDOW, SPARSITY = 0.5, 0.5, 0.3
# Shares of the steps over which the rate rises, the weight of sparsity rises, and the rate falls to 0.
RISE, SPARSE_RISE, FALL = 0.05, 0.3, 0.3
DECAYS, SMALL = (0.9, 0.999), 1e-8
# A rate of Gao et al.: it falls with the root of the number of features.
RATE, RATE_FEATURES, HIGHEST_RATE = 2e-4, 2**14, 3e-3


@dataclass(frozen=True)
class Plan:
    """width: of the activations. features: of the dictionary. k: features that are active on a token, with JumpReLU the
    mean that is aimed at. gradient: weight of the model's gradient where features are chosen by it too. repair: whether
    dead features are given something to do."""

    width: int
    features: int
    k: int
    activation: Activation = "topk"
    steps: int = 4000
    batch: int = 512
    rate: float | None = None
    gradient: float = 1.0
    repair: bool = True

    @property
    def highest_rate(self) -> float:
        return self.rate or min(HIGHEST_RATE, RATE / math.sqrt(self.features / RATE_FEATURES))

    @property
    def nbytes(self) -> int:
        """Memory that one training takes: parameters, gradients and two moments of each, and one batch."""
        return 4 * (8 * self.features * self.width + 8 * self.batch * self.features)

    @property
    def operations(self) -> float:
        """Multiplications and additions of all steps: two products forward, four backward, and what else a step does as
        three more."""
        return 9 * 2.0 * self.steps * self.batch * self.features * self.width


class Training:
    """Parameters and their moments after `done` steps. Rows are expected round 0, with the root of the width as their
    length."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.done = plan, 0
        decoder = torch.randn(plan.features, plan.width, generator=torch.Generator().manual_seed(seed))
        decoder /= decoder.norm(dim=1, keepdim=True)
        self.parameters = {"encoder": decoder.clone(), "bias": torch.zeros(plan.features), "decoder": decoder,
                           "centre": torch.zeros(plan.width)}
        if plan.activation == "jumprelu":
            self.parameters["threshold"] = torch.full((plan.features,), math.log(THRESHOLD))
        self._first = {name: torch.zeros_like(held) for name, held in self.parameters.items()}
        self._second = {name: torch.zeros_like(held) for name, held in self.parameters.items()}
        self._idle = torch.zeros(plan.features, dtype=torch.int64)

    def step(self, x: Tensor, gradient: Tensor | None = None) -> float:
        """One step on `x [batch, width]`; the share of its squared length that is not explained.

        gradient: of the model's loss at each row, `[batch, width]`, where features are chosen by it too.
        """
        held = {name: tensor.detach().requires_grad_() for name, tensor in self.parameters.items()}
        with torch.enable_grad():
            loss, error, fired = self._loss(held, x, gradient)
            found = torch.autograd.grad(loss, list(held.values()))
        self._idle = torch.where(fired, 0, self._idle + 1)
        self._update(dict(zip(held, found, strict=True)))
        # Not while the rate falls, when there is no time left to learn something else.
        early = self.done < (1 - FALL) * self.plan.steps
        if self.plan.repair and "threshold" in held and early and self.done % ANEW_STEPS == 0:
            self._begin_anew(error)
        return float(error.square().sum() / x.square().sum())

    def _loss(self, held: Mapping[str, Tensor], x: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the error `[batch, width]`, and which features were active `[features]`."""
        pre = (x - held["centre"]) @ held["encoder"].T + held["bias"]
        sparsity: Any = 0.0
        if self.plan.activation == "topk":
            value = _largest(pre, self.plan.k, self._felt(held["decoder"].detach(), gradient))
        else:
            threshold = held["threshold"].exp()
            value = _Jump.apply(pre, threshold)  # type: ignore[no-untyped-call]
            active = _Step.apply(pre, threshold).sum(dim=1).mean()  # type: ignore[no-untyped-call]
            rise = min(1.0, self.done / max(1.0, SPARSE_RISE * self.plan.steps))
            sparsity = rise * SPARSITY * (active / self.plan.k - 1).square()
        error = x - value @ held["decoder"] - held["centre"]
        size = x.square().sum(dim=1).mean()
        loss = error.square().sum(dim=1).mean() / size + sparsity
        dead = self._idle >= IDLE_STEPS
        if self.plan.repair and "threshold" not in held and bool(dead.any()):
            loss = loss + AUXILIARY * self._auxiliary(held, pre, error.detach(), dead)
        return loss, error.detach(), (value.detach() > 0).any(dim=0)

    def _auxiliary(self, held: Mapping[str, Tensor], pre: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """How badly the dead features explain what the others leave: 1 where they explain nothing of it."""
        index = dead.nonzero().flatten()
        value = _largest(pre[:, index], min(len(index), max(1, self.plan.width // 2)), None)
        left = (error - value @ held["decoder"][index]).square().sum(dim=1).mean()
        return left / error.square().sum(dim=1).mean().clamp_min(SMALL)

    def _begin_anew(self, error: Tensor) -> None:
        """Dead features become the directions of the largest errors, one each."""
        dead = (self._idle >= IDLE_STEPS).nonzero().flatten()[:len(error)]
        if not len(dead):
            return
        worst = error[error.norm(dim=1).topk(len(dead)).indices]
        row = worst / worst.norm(dim=1, keepdim=True).clamp_min(SMALL)
        begun = {"encoder": row, "decoder": row, "bias": 0.0, "threshold": math.log(THRESHOLD)}
        for name, value in begun.items():
            self.parameters[name][dead] = value
            self._first[name][dead], self._second[name][dead] = 0.0, 0.0
        self._idle[dead] = 0

    def _felt(self, decoder: Tensor, gradient: Tensor | None) -> Tensor | None:
        """`[batch, features]`: what the choice multiplies pre-activations by; its mean is 1 + the plan's `gradient`."""
        if gradient is None:
            return None
        felt = (gradient @ decoder.T).abs()
        return 1 + self.plan.gradient * felt / felt.mean().clamp_min(SMALL)

    def _update(self, found: Mapping[str, Tensor]) -> None:
        """Adam; decoder rows keep length 1, and their gradient loses its part along them."""
        self.done += 1
        progress = self.done / self.plan.steps
        rate = self.plan.highest_rate * min(1.0, progress / RISE, max(0.0, 1 - progress) / FALL)
        for name, gradient in found.items():
            held = self.parameters[name]
            if name == "decoder":
                gradient = gradient - (gradient * held).sum(dim=1, keepdim=True) * held
            self._first[name].lerp_(gradient, 1 - DECAYS[0])
            self._second[name].lerp_(gradient.square(), 1 - DECAYS[1])
            first = self._first[name] / (1 - DECAYS[0]**self.done)
            second = self._second[name] / (1 - DECAYS[1]**self.done)
            held = held - rate * first / (second.sqrt() + SMALL)
            if name == "decoder":
                held = held / held.norm(dim=1, keepdim=True).clamp_min(SMALL)
            self.parameters[name] = held

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        return {**self.parameters, **{f"first.{name}": held for name, held in self._first.items()},
                **{f"second.{name}": held for name, held in self._second.items()}, "idle": self._idle}

    def restore(self, state: Mapping[str, Tensor], done: int) -> None:
        """Go on from a `state` after `done` steps."""
        self.done, self._idle = done, state["idle"]
        for name in self.parameters:
            self.parameters[name] = state[name]
            self._first[name], self._second[name] = state[f"first.{name}"], state[f"second.{name}"]

    def numbers(self, mean: Tensor, scale: float) -> dict[str, Tensor]:
        """As an artifact of the kind `sae` has them, for activations that were taken `mean [width]` from and divided by
        `scale`. A value is then the length, in the activations' own units, of what the feature adds."""
        held = {name: tensor.double() for name, tensor in self.parameters.items()}
        shift = mean.double() + scale * held["centre"]
        found = {"encoder": held["encoder"], "encoder_bias": scale * held["bias"] - held["encoder"] @ shift,
                 "decoder": held["decoder"], "decoder_bias": shift}
        if "threshold" in held:
            found["threshold"] = scale * held["threshold"].exp()
        else:
            found["k"] = torch.tensor(self.plan.k)
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def _largest(pre: Tensor, k: int, felt: Tensor | None) -> Tensor:
    """The k largest of each row that are above 0, by their size or by it times `felt`; 0 elsewhere."""
    value = pre.relu()
    where = (value.detach() if felt is None else value.detach() * felt).topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(value).scatter(-1, where, value.gather(-1, where))


class _Jump(torch.autograd.Function):
    """v where v > threshold, else 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        [gradient] = gradients
        near = ((pre - threshold).abs() < WINDOW / 2).float()
        return gradient * (pre > threshold), -(threshold / WINDOW * near * gradient).sum(dim=0)


class _Step(torch.autograd.Function):
    """1 where v > threshold, else 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < WINDOW / 2).float() * gradients[0] / WINDOW
        return near, -near.sum(dim=0)
