"""Errors are data: a path is a tuple that callers extend, and only its base class writes it as text."""

import ast
from pathlib import Path as File

import pytest

from steering.language.errors import InvalidSpec, Path, path_text

ROOT = File(__file__).parents[2]


@pytest.mark.parametrize(("path", "text"), [
    ((), ""), (("model",), "model"),
    (("steering", "interventions", 1, "layers", 0), "steering.interventions[1].layers[0]"),
    (("Content-Type",), "Content-Type"), (("inline", "a\nb\ud800" + 100 * "x"), "inline.a?b?" + 76 * "x")])
def test_a_path_as_a_user_writes_it(path: Path, text: str) -> None:
    assert path_text(path) == text


def test_a_path_grows_outwards_and_can_be_replaced() -> None:
    error = InvalidSpec("wrong", param="layers", value=9)
    assert error.at("interventions", 1) is error
    assert (error.path, error.param, error.value) == (("interventions", 1, "layers"), "interventions[1].layers", 9)
    assert error.about("steering", *error.path[2:]).path == ("steering", "layers")
    assert InvalidSpec("wrong").param is None
    # A name with a dot is one step, and is not taken apart.
    assert InvalidSpec("wrong", param=("options", "a.b")).path == ("options", "a.b")


def as_text(source: str) -> list[int]:
    """Lines that give a path of several steps as text, or read the text of one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "param":
            value = node.value
            if isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str)
                                                    and any(sign in value.value for sign in ".[")):
                found.append(value.lineno)
        elif isinstance(node, ast.Assign):
            found += [target.lineno for target in node.targets if ast.unparse(target).endswith("error.param")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) \
                and ast.unparse(node.func.value).endswith("error.param"):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("folder", ["steering", "vectors", "server"])
def test_no_path_is_written_or_read_as_text(folder: str) -> None:
    files = [file for file in sorted((ROOT / folder).rglob("*.py"))
             if not file.is_relative_to(ROOT / "vectors" / "extract")]
    assert files
    assert {str(file.relative_to(ROOT)): lines for file in files if (lines := as_text(file.read_text()))} == {}


def test_the_check_sees_what_it_looks_for() -> None:
    source = ('raise E("x", param=f"layers[{n}]")\nraise E("x", param="options.mode")\nerror.param = "lens"\n'
              'error.param.removeprefix("a")\nraise E("x", param=("options", n))\nraise E("x", param="model")')
    assert as_text(source) == [1, 2, 3, 4]
