"""What `make` would do on a machine that has nothing yet."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("target", "end"), [("serve", "trimtab serve"), ("test", "-m pytest"),
                                             ("test-all", "-m pytest")])
def test_the_console_is_built_before_it_is_served_or_tested(target: str, end: str) -> None:
    planned = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, check=True, text=True,
                             capture_output=True).stdout
    assert 0 < planned.find("run --silent build") < planned.find(end)
