"""docs/pipeline.md tells the way of a spec through the code: every name in it is there."""

import importlib.util
import re
from importlib import import_module
from typing import Any

import pytest

from scripts.docs import DOCS

PAGE = (DOCS / "pipeline.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`((?:steering|vectors|server)\.[\w.]+)`", PAGE)))


def found(name: str) -> Any:
    """What a dotted name leads to: the longest module of it, then attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        if _is_module(module):
            value: Any = import_module(module)
            for part in parts[count:]:
                value = getattr(value, part)
            return value
    raise ModuleNotFoundError(name)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_page_is_there(name: str) -> None:
    assert found(name) is not None


def test_the_page_names_the_steps() -> None:
    assert len(NAMES) > 25
    assert re.findall(r"^(\d+)\. \*\*", PAGE, re.MULTILINE) == [str(n) for n in range(1, 11)]


@pytest.mark.parametrize("name", ["steering.programs.compiler.nothing", "steering.nowhere.compile_program"])
def test_the_check_sees_a_name_that_is_gone(name: str) -> None:
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        found(name)
