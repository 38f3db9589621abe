"""What vLLM's processes write to the terminal: a start that fails leaves one line in a file and no traceback."""

import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.engines.vllm import quiet
from server.engines.vllm.host.config import awake
from server.engines.vllm.host.process import read_reason, reason_file
from tests.sweeps import sweep_of

WORKER, CORE = "vllm.v1.executor.multiproc_executor", "vllm.v1.engine.core"


def fail(held: bool) -> None:
    """As vLLM's processes do: a worker fails, then the engine that waits for it, whose exception ends the process."""
    logging.basicConfig(stream=sys.stderr)
    if held:
        quiet.hold_back_tracebacks()
    try:
        raise ValueError("the weights are damaged\nand more")
    except ValueError:
        logging.getLogger(WORKER).exception("WorkerProc failed to start.")
    try:
        raise RuntimeError("See stack trace for root cause.")
    except RuntimeError:
        logging.getLogger(CORE).exception("EngineCore failed to start.")
        raise


@pytest.mark.parametrize("held", sweep_of(True, slow=[False]))
def test_a_process_that_does_not_start_says_why_in_a_file(held: bool, capfd: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(quiet.LEVEL, raising=False)
    with reason_file() as reason:
        process = multiprocessing.get_context("spawn").Process(target=fail, args=(held,))
        process.start()
        process.join(120)
        assert process.exitcode == 1
        assert read_reason(reason) == ("the weights are damaged" if held else "")
    assert quiet.REASON not in os.environ and not reason.parent.exists()
    assert ("Traceback" in capfd.readouterr().err) is not held


def test_an_operator_who_asks_for_vllms_words_gets_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(quiet.LEVEL, "DEBUG")
    monkeypatch.setenv(quiet.REASON, str(tmp_path / "reason"))
    before = list(logging.getLogger(CORE).filters)
    quiet.hold_back_tracebacks()
    assert logging.getLogger(CORE).filters == before


def test_the_messages_are_those_of_the_installed_vllm() -> None:
    """Each beginning stands in the module whose logger says it."""
    import importlib.util

    for name, given in {**quiet.WARNINGS, **{name: (one,) for name, one in quiet.FAILURES.items()}}.items():
        spec: Any = importlib.util.find_spec(name)
        source = Path(spec.origin).read_text().replace('"\n', "").replace("  ", "")
        for beginning in given:
            words = beginning.removeprefix("libtcmalloc ").removeprefix("libiomp ")
            assert words in source, (name, beginning)


def test_deprecations_inside_vllm_are_not_shown() -> None:
    code = "import warnings; warnings.warn_explicit('old', FutureWarning, 'f.py', 1, module={!r})"
    with awake():
        shown = [subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True).stderr
                 for module in ("vllm.triton_utils.dispatcher", "elsewhere")]
    assert not shown[0] and "FutureWarning" in shown[1]
    assert "dispatcher" not in os.environ.get("PYTHONWARNINGS", "")
