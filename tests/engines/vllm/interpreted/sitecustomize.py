"""Runs Triton's kernels without a GPU, in every Python process that starts with this folder on its path.

vLLM's second model runner is written in Triton and vLLM offers it only where Triton has a backend for the platform.
Triton's interpreter (TRITON_INTERPRET=1) carries the same kernels out in numpy; all it lacks is a backend of the name
"cpu" for vLLM to find. Python imports a module of this name by itself when it starts.
"""

import os
import types

if os.environ.get("TRITON_INTERPRET") == "1":
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

    backends.setdefault("cpu", types.SimpleNamespace(compiler=None, driver=Host))
