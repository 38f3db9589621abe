"""docs/extending.md is carried out in a copy of the repository, and the tests that it names pass there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
NEW = re.compile(r"^New file `([^`]+)`:\n\n```python\n(.*?)```$", re.MULTILINE | re.DOTALL)
CHANGED = re.compile(r"^In `([^`]+)`, `([^`]+)` becomes `([^`]+)`\.$", re.MULTILINE)
NAMED = re.compile(r"`pytest ((?:tests/\S+ )+-k \w+)`")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the tests need, with all that the page says done to it."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("steering", "vectors", "server", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "web"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, text in NEW.findall(PAGE):
        assert not (copy / name).exists(), f"{name} is there already"
        (copy / name).write_text(text)
    for name, before, after in CHANGED.findall(PAGE):
        text = (copy / name).read_text()
        assert text.count(before) == 1, f"{name} holds {before!r} {text.count(before)} times"
        (copy / name).write_text(text.replace(before, after))
    return copy


def test_the_page_has_the_three_additions() -> None:
    assert len(NEW.findall(PAGE)) == 2
    assert len(CHANGED.findall(PAGE)) == 5
    assert len(NAMED.findall(PAGE)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", NAMED.findall(PAGE))
def test_what_was_added_is_held_by_the_tests_named(extended: Path, command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *command.split()],
                          cwd=extended, env={**os.environ, "PYTHONPATH": str(extended)}, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"^[1-9]\d* passed", done.stdout, flags=re.MULTILINE), done.stdout[-1000:]
