"""Runs Triton's kernels without a GPU, in every Python process that starts with this folder on its path.

vLLM's second model runner is written in Triton and vLLM offers it only where Triton has a backend for the platform.
Triton's interpreter (TRITON_INTERPRET=1) carries the same kernels out in numpy; all it lacks is a backend of the name
"cpu" for vLLM and torch.compile to find. Python imports a module of this name by itself when it starts.
"""

import os
import types
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    class Host:
        """The driver of a device that is the CPU itself: no compiler, no streams, one device."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_current_device(self) -> int:
            return 0

    class Interpreter:
        """What Inductor asks every backend for, to name its cache: it writes C++ for a CPU, no Triton."""

        def __init__(self, target: GPUTarget) -> None:
            self.target = target

        @staticmethod
        def supports_target(target: GPUTarget) -> bool:
            return target.backend == "cpu"

        def hash(self) -> str:
            return "interpreted"

    def nanargmax(a: Any, axis: Any = None, out: Any = None, **fields: Any) -> Any:
        """Of nothing but NaN the first, as a kernel has it, not an error: in vLLM's profile run attention leaves its
        output as it was allocated, and the dummy sampler draws from what comes of that."""
        return np.argmax(np.where(np.isnan(a), -np.inf, a), axis=axis, out=out, **fields)

    np.nanargmax = nanargmax
    backends.setdefault("cpu", types.SimpleNamespace(compiler=Interpreter, driver=Host))
