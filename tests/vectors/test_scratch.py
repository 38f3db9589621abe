"""Scratch folders of processes that were killed are removed, and no others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vectors.scratch import ScratchFolder, sweep

HOLD = "from vectors.scratch import ScratchFolder; f = ScratchFolder(); print(f.path, flush=True); input()"


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_killed_process_leaves_a_folder_and_the_sweep_takes_it(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stdin=subprocess.PIPE,
                               env={**os.environ, "TMPDIR": str(tmp_path)}, text=True)
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    (left / "rows").write_bytes(b"x" * 100)
    assert left.parent == tmp_path and sweep(min_age_s=-1) == 0 and left.is_dir()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert sweep() == 0, "a young one may be one that is being made"
    assert sweep(min_age_s=-1) == 1 and not left.exists()


def test_one_in_use_and_other_folders_stay(tmp_path: Path) -> None:
    other = tmp_path / "trimtab-something"
    other.mkdir()
    folder = ScratchFolder()
    assert sweep(min_age_s=-1) == 0 and folder.path.is_dir() and other.is_dir()
    folder.cleanup()
    assert not folder.path.exists() and sweep(min_age_s=-1) == 0
