"""What a training that was cut off goes on from."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

STEP = "step"


class Checkpoint:
    """One file. path: None keeps nothing. lost: why the last state could not be kept; the training goes on all the
    same."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lost: str | None = None

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """Steps done and tensors; None where there are none, or where they cannot be read."""
        if self.path is None:
            return None
        try:
            with safe_open(self.path, "pt") as file:
                return int((file.metadata() or {})[STEP]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        if self.path is None:
            return
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {STEP: str(step)})
            os.replace(partial, self.path)
            self.lost = None
        except (OSError, SafetensorError) as error:
            self.lost = str(error)
            with suppress(OSError):
                partial.unlink(missing_ok=True)
