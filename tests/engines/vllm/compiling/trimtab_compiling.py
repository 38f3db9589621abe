"""A vLLM plugin for tests, found by vLLM where this folder is on the path of a process.

Lets vLLM's own compiler with its cache of graphs, which it offers on GPUs, run on the CPU, and puts the two faults in
that a stale graph needs: TRIMTAB_TEST_FAULTS lists "no_hooks" (the model is compiled as if there were no hooks) and
"no_manifest" (Trimtab's manifest is left out of the hash that vLLM keys compiled graphs by).
"""

import multiprocessing
import os


def register() -> None:
    if multiprocessing.parent_process() is None:
        return
    from vllm.compilation.passes.utility import fix_functionalization
    from vllm.config import VllmConfig

    from server.engines.vllm.worker.attach import Hooks

    # It names kernels that the CPU build does not have, and only saves copies.
    fix_functionalization.FixFunctionalizationPass.__call__ = lambda self, graph: None
    faults = os.environ.get("TRIMTAB_TEST_FAULTS", "").split(",")
    if "no_hooks" in faults:
        Hooks._block = lambda self, layer, block: None
    if "no_manifest" in faults:
        honest = VllmConfig.compute_hash

        def compute_hash(self: VllmConfig) -> str:
            given = self.additional_config
            self.additional_config = {}
            try:
                return honest(self)
            finally:
                self.additional_config = given

        VllmConfig.compute_hash = compute_hash
