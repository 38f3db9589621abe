"""Errors are data: a path is a tuple that callers extend, and only its base class writes it as text."""

import ast
import re
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


WRITTEN = re.compile(r"(default_spec|gate|grader|inline|layers|metadata|options|scope|strength|vllm_args)"
                     r"(\.\w+|\[\d+\])+|steering\.(default|guard|interventions|monitor|preset|report)\b.*")


def as_text(source: str) -> list[int]:
    """Lines that give a path of several steps as text, or read the text of one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.keyword(arg="param", value=ast.JoinedStr()):
                found.add(node.value.lineno)
            case ast.Constant(value=str(text)) if WRITTEN.fullmatch(text):
                found.add(node.lineno)
            case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="error"), attr="param")]):
                found.add(node.lineno)
            case ast.Call(func=ast.Attribute(value=ast.Attribute(value=ast.Name(id="error"), attr="param"))):
                found.add(node.lineno)
    return sorted(found)


@pytest.mark.parametrize("folder", ["steering", "vectors", "server"])
def test_no_path_is_written_or_read_as_text(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert {str(file.relative_to(ROOT)): lines for file in files if (lines := as_text(file.read_text()))} == {}


def test_the_check_sees_what_it_looks_for() -> None:
    source = ('raise E("x", param=f"layers[{n}]")\nraise E("x", param="options.mode")\nerror.param = "lens"\n'
              'error.param.removeprefix("a")\nraise E("x", param=("options", n))\nraise E("x", param="model")\n'
              'check(n, "inline.dims")')
    assert as_text(source) == [1, 2, 3, 4, 7]
