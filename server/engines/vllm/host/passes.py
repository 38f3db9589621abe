"""Teacher-forced passes: what a request must carry, and what workers send back."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from server.engines.adapters import Adapter
from server.engines.vllm.wire import PASS, Key
from steering.divergence import Divergence
from steering.programs.program import Program
from steering.programs.touch import Touch


@dataclass(frozen=True)
class Pass:
    """Tokens to run; from `prompt_length` on they count as generated.

    keep_from: keep final hidden states from this position on, None for none of them. capture: activations to copy at
    `positions`, which are sorted. adapter: what is on the model.
    """

    token_ids: Sequence[int]
    prompt_length: int
    program: Program | None
    roles: Sequence[str] | None
    keep_from: int | None = None
    capture: tuple[Key, ...] = ()
    positions: tuple[int, ...] = ()
    adapter: Adapter | None = None
    tag: str = field(default_factory=lambda: Pass.new_tag())

    @staticmethod
    def new_tag() -> str:
        return f"{PASS}{uuid.uuid4().hex}"

    def touch(self, program: Program) -> Touch:
        # One position more, for the token that vLLM samples at the end and that is thrown away.
        length = min(self.prompt_length, len(self.token_ids))
        return program.touch(self.token_ids[:length], len(self.token_ids) - length + 1, self.roles)

    @property
    def extra(self) -> dict[str, Any]:
        carried: dict[str, Any] = {"name": self.tag}
        if self.keep_from is not None:
            carried["keep"] = {"tag": self.tag, "from": self.keep_from}
        if self.capture:
            carried["capture"] = {"tag": self.tag, "keys": [list(key) for key in self.capture],
                                  "positions": list(self.positions)}
        return carried


def keeping(tag: str, first: int, last_layer: int) -> dict[str, Any]:
    """What a completion carries whose final hidden states, and the residual stream before the last norm, are to be kept
    from the position `first` on."""
    return {"keep": {"tag": tag, "from": first, "bounded": True},
            "capture": {"tag": tag, "keys": [["resid_post", last_layer]], "positions": None}}


def tensor_of(content: bytes) -> torch.Tensor:
    """float32 numbers as a worker sent them, `[n]`."""
    return torch.from_numpy(np.frombuffer(content, dtype=np.float32).copy())


def divergence_of(answer: Mapping[str, bytes]) -> Divergence:
    return Divergence(**{f.name: tensor_of(answer[f.name]) for f in fields(Divergence)})
