"""Starting vLLM's AsyncLLM with Trimtab's plugin awake."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.engines.vllm.host.config import awake, engine_config
from server.engines.vllm.host.options import VllmOptions
from server.engines.vllm.host.pulse import Pulses, beating
from server.engines.vllm.host.reading import ModelReading
from server.engines.vllm.quiet import LEVEL, REASON, first_line
from steering.language.errors import TrimtabError, UnsupportedModel


def start_llm(options: VllmOptions, reading: ModelReading, pulses: Pulses) -> Any:
    """An AsyncLLM in processes of its own, hooks attached; `pulses` beat with each step of a replica.

    Raises:
        InvalidSettings: an argument that vLLM refuses, or under which steering is not right.
        UnsupportedModel: vLLM does not start; with its reason.
    """
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    with awake(), reason_file() as reason:
        config = engine_config(options, reading)
        try:
            return AsyncLLM.from_vllm_config(config, usage_context=UsageContext.ENGINE_CONTEXT,
                                             stat_loggers=[beating(pulses)],
                                             disable_log_stats=bool(options.extra.get("disable_log_stats", False)))
        except TrimtabError:
            raise
        except Exception as error:
            # vLLM raises many kinds; all of them mean that nothing can be served. It says itself only that a process is
            # gone, and that process says why.
            raise UnsupportedModel(
                f"vLLM does not start: {read_reason(reason) or first_line(error)}", param="model",
                fix=f"Mend what it names, or set {LEVEL}=INFO to see all that vLLM says about it.") from error


@contextmanager
def reason_file() -> Iterator[Path]:
    """Where processes that are started in the block say why they do not start."""
    with tempfile.TemporaryDirectory(prefix="trimtab-vllm-") as folder:
        path = Path(folder) / "reason"
        os.environ[REASON] = str(path)
        try:
            yield path
        finally:
            os.environ.pop(REASON, None)


def read_reason(path: Path) -> str:
    """Empty where none was given."""
    try:
        return path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
