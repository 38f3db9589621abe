"""The cache holds whole models only, whatever kills the process that makes one."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server.checkpoints.cache import ModelCache
from server.checkpoints.progress import silent
from server.checkpoints.unavailable import ModelUnavailable

DIGEST = "ab" * 32
KILLED = """
import os, signal, sys
from pathlib import Path
from server.checkpoints.cache import ModelCache
from server.checkpoints.progress import silent

def make(folder, scratch):
    (folder / "config.json").write_text("half")
    (scratch / "wheel").write_text("half")
    (cache.downloads / ".part-x").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)

cache = ModelCache(Path(sys.argv[1]))
cache.folder(sys.argv[2], "model", make, silent)
"""


def fill(folder: Path, scratch: Path) -> None:
    (folder / "config.json").write_text("whole")


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_a_killed_run_leaves_nothing_that_counts_and_the_next_clears_it(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), DIGEST], env=os.environ.copy())
    assert done.returncode == -signal.SIGKILL
    cache = ModelCache(tmp_path)
    assert not cache.place(DIGEST, "model").exists()
    assert any("half" in path.read_text() for path in tmp_path.rglob("config.json"))
    folder = cache.folder(DIGEST, "model", fill, silent)
    assert (folder / "config.json").read_text() == "whole"
    assert everything(tmp_path) == {"models.lock", str((folder / "config.json").relative_to(tmp_path))}
    assert list(cache.downloads.iterdir()) == []


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path, scratch: Path) -> None:
        fill(folder, scratch)
        raise ModelUnavailable("no", param="model")

    cache = ModelCache(tmp_path)
    with pytest.raises(ModelUnavailable, match="no"):
        cache.folder(DIGEST, "model", fails, silent)
    assert everything(tmp_path) == {"models.lock"}


def test_two_that_want_the_same_model_make_it_once(tmp_path: Path) -> None:
    begun, waiting, made = threading.Event(), threading.Event(), []

    def slowly(folder: Path, scratch: Path) -> None:
        made.append(1)
        begun.set()
        assert waiting.wait(60)
        fill(folder, scratch)

    def said(what: str, done: int, total: int) -> None:
        if "Waiting" in what:
            waiting.set()

    first = threading.Thread(target=lambda: ModelCache(tmp_path).folder(DIGEST, "model", slowly, silent))
    first.start()
    assert begun.wait(60)
    folder = ModelCache(tmp_path).folder(DIGEST, "model", slowly, said)
    first.join(60)
    assert len(made) == 1
    assert (folder / "config.json").read_text() == "whole"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelUnavailable, match="cannot be put into the cache") as refused:
        ModelCache(tmp_path / "file").folder(DIGEST, "model", fill, silent)
    assert refused.value.param == "cache_dir"
    assert "TRIMTAB_CACHE_DIR" in str(refused.value.fix)


def test_what_is_there_needs_no_lock_and_no_write(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    place = cache.place(DIGEST, "model")
    place.mkdir(parents=True)
    assert cache.folder(DIGEST, "model", lambda folder, scratch: pytest.fail("made again"), silent) == place
    assert not (tmp_path / "models.lock").exists()
