"""The end of a model: the final hidden states of its passes, and the logits that it makes of such states."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

# Two ways to the same logits differ by rounding at most.
TOLERANCE = 1e-2


class Head:
    """Sees the final hidden states, after the last norm, of the passes that are made while `listening`.

    Attributes:
        usable: whether the logits that the model makes of states alone are those that it makes of tokens.
    """

    def __init__(self, model: Any) -> None:
        self.listening = False
        self._last: Tensor | None = None
        self._device = model.device
        decoder = getattr(model, model.base_model_prefix)
        self._hook = decoder.register_forward_hook(self._look)
        # The model's own forward with its decoder left out, so that logits are scaled and capped as the model does it.
        self._head = copy.copy(model)
        self._head._modules = {**model._modules, model.base_model_prefix: _Through()}
        self.usable = self._agrees(model)

    def detach(self) -> None:
        self._hook.remove()

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[n, vocab_size]` of final hidden states `[n, d_model]`. Safe beside passes of the model."""
        made: Tensor = self._head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]
        return made

    def rows(self, index: Tensor) -> Tensor:
        """Final hidden states at some tokens of the last pass, a copy `[n, d_model]`."""
        if self._last is None:
            raise RuntimeError("no pass has been listened to")
        return self._last.flatten(0, 1)[index]

    def forget(self) -> None:
        """Let go of what was seen."""
        self._last = None

    @torch.no_grad()
    def _agrees(self, model: Any) -> bool:
        self.listening = True
        try:
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=self._device), use_cache=False).logits
            again = self.logits(self.rows(torch.tensor([0, 1], device=self._device)))
            return torch.allclose(logits[0].float(), again.float(), rtol=TOLERANCE, atol=TOLERANCE)
        except (TypeError, AttributeError, ValueError, IndexError, RuntimeError):
            # A family whose forward asks more of its decoder than its states: nothing is kept of its completions.
            return False
        finally:
            self.listening = False
            self.forget()

    def _look(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self.listening:
            self._last = output.last_hidden_state


@dataclass(frozen=True)
class Rows:
    """What a pass left where generated tokens were predicted: final hidden states and the last layer's stream,
    `[G, d_model]` each."""

    hidden: Tensor
    residual: Tensor

    def upto(self, count: int) -> "Rows":
        return Rows(self.hidden[:count], self.residual[:count])

    def then(self, other: "Rows") -> "Rows":
        return Rows(torch.cat([self.hidden, other.hidden]), torch.cat([self.residual, other.residual]))

    def logits(self, head: Head) -> Callable[[slice], Tensor]:
        return lambda part: head.logits(self.hidden[part])


class _Through(nn.Module):
    """Stands in the place of a decoder: the states that it is given are those that it gives."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> "_States":
        return _States(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]


@dataclass
class _States(MoeModelOutputWithPast):
    """With the fields that any family looks for, all of them empty but the states."""

    cross_attentions: tuple[Tensor, ...] | None = None
