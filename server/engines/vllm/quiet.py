"""What vLLM writes to the terminal by itself, kept to what an operator can act on.

Warnings about what Trimtab asks of vLLM are held back, because an operator has not caused them and cannot mend them.
Where a process of vLLM fails while it starts, its traceback is held back, too, and the reason travels to the server in
a file. The server tells it in one sentence. With VLLM_LOGGING_LEVEL set, everything is shown.
"""

import io
import logging
import os
import sys
import warnings
from pathlib import Path

# The file for the reason of a start that fails, named in the environment that vLLM's processes inherit.
REASON = "TRIMTAB_VLLM_REASON"
LEVEL = "VLLM_LOGGING_LEVEL"
# Beginnings of warnings, by vLLM's loggers. They are about one position over the model's context, which no request
# reaches; a build for CPUs, which is without Triton and without libraries that are loaded before it; the eager mode
# that a setting asks for; and prompts given as token ids.
WARNINGS = {"vllm.config.model": ("User-specified max_model_len",),
            "vllm.triton_utils.importing": ("Triton is installed, but",),
            "vllm.platforms.cpu": ("Triton is not installed",),
            "vllm.config.vllm": ("Model Runner V2 requires Triton", "Enforce eager set",
                                 "Inductor compilation was disabled"),
            "vllm.v1.worker.cpu_worker": ("libtcmalloc is not found", "libiomp is not found"),
            "vllm.v1.engine.input_processor": ("Passing raw prompts to InputProcessor",)}
# The last words of a process that fails while it starts, and the logger that says them.
FAILURES = {"vllm.v1.engine.core": "EngineCore failed to start", "vllm.v1.executor.multiproc_executor":
            "WorkerProc failed to start"}
# In vLLM's own modules, of deprecated names in torch.
FUTURE = "ignore::FutureWarning:vllm.triton_utils.dispatcher"
LONGEST = 500


class _Without(logging.Filter):
    """Drops records that begin in one of some ways."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginnings)


class _LastWords(logging.Filter):
    """Writes why its process does not start into the file, and lets the process end without a traceback."""

    def __init__(self, beginning: str, path: Path) -> None:
        super().__init__()
        self._beginning, self._path = beginning, path

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or not record.getMessage().startswith(self._beginning):
            return True
        try:
            # The first process that fails knows the cause; those above it only know that it is gone.
            with self._path.open("x") as file:
                file.write(first_line(error))
        except FileExistsError:
            pass
        except OSError:
            return True
        # What is raised from here on is printed by multiprocessing.
        sys.stderr = io.StringIO()
        return False


def first_line(error: BaseException) -> str:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return said[:LONGEST]


def hold_back_warnings() -> None:
    """In this process, from now on. Does nothing the second time."""
    for name, beginnings in WARNINGS.items():
        _add(name, _Without(beginnings))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils\.dispatcher")


def hold_back_tracebacks() -> None:
    """In a process of vLLM that is starting, unless the operator wants to see all that it says."""
    path = os.environ.get(REASON)
    if path is None or LEVEL in os.environ:
        return
    for name, beginning in FAILURES.items():
        _add(name, _LastWords(beginning, Path(path)))


def _add(name: str, added: logging.Filter) -> None:
    logger = logging.getLogger(name)
    if not any(isinstance(one, type(added)) for one in logger.filters):
        logger.addFilter(added)
