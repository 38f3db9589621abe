"""Imports go one way, server -> vectors -> steering; clients import none of them; `__init__` files only list names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = {"steering", "vectors", "server", "lab", "benchmarks", "scripts", "tests", "trimtab_client"}
MAY_IMPORT = {
    "steering": set(),
    "vectors": {"steering"},
    "server": {"steering", "vectors", "trimtab_client"},
    "lab": set(),
    # Methods run on the lab's models: what reads both sides stands apart from what makes the models.
    "lab/replications": {"lab", "steering", "vectors"},
    "clients/python/trimtab_client": set(),
}


def house_imports(source: str) -> set[str]:
    """Top-level packages of this house that `source` imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found & HOUSE


def is_listing(node: ast.stmt, first: bool) -> bool:
    """Whether a statement of an `__init__.py` is its docstring, an import or `__all__`."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets] == ["__all__"]
    return first and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def python_files(folder: str) -> list[Path]:
    """Files of a folder, without those of a folder inside it that has a rule of its own."""
    own = [ROOT / other for other in MAY_IMPORT if other.startswith(f"{folder}/")]
    return sorted(path for path in (ROOT / folder).rglob("*.py") if not any(map(path.is_relative_to, own)))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {Path(folder).name}
    files = python_files(folder)
    assert files, f"{folder} holds no Python file"
    wrong = {str(path.relative_to(ROOT)): found - allowed for path in files
             if (found := house_imports(path.read_text())) - allowed}
    assert wrong == {}


def test_only_the_command_line_uses_the_client() -> None:
    users = {path.relative_to(ROOT).parts[:2] for path in python_files("server")
             if "trimtab_client" in house_imports(path.read_text())}
    assert users <= {("server", "cli"), ("server", "cli.py")}


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "benchmarks", "scripts", "tests"])
def test_init_files_only_list_names(folder: str) -> None:
    wrong = [f"{path.relative_to(ROOT)}:{node.lineno}"
             for path in python_files(folder) if path.name == "__init__.py"
             for number, node in enumerate(ast.parse(path.read_text()).body) if not is_listing(node, number == 0)]
    assert wrong == []


def test_the_checks_see_what_they_look_for() -> None:
    source = "def f():\n    from server.app import x\n    import steering.language.spec, os"
    assert house_imports(source) == {"server", "steering"}
    body = ast.parse('"""Doc."""\nimport a\n__all__ = ["a"]\nx = 1\n"""late"""').body
    assert [is_listing(node, number == 0) for number, node in enumerate(body)] == [True, True, True, False, False]


# Besides the helper: two that keep a thread of their own as long as the server lives, and vLLM's start, which needs
# what its thread made also when it is cancelled.
OWN_THREADS = {"threads.py", "requests/killswitch.py", "background/housekeeping.py", "engines/vllm/host/connection.py"}


def test_threads_are_started_by_one_helper() -> None:
    """Elsewhere a cancelled caller would leave its thread behind, with the locks and hooks that it uses."""
    using = {str(path.relative_to(ROOT / "server")) for path in (ROOT / "server").rglob("*.py")
             if re.search(r"\bto_thread\b|\brun_in_executor\b", path.read_text())}
    assert using - {path for path in using if path.startswith("cli/")} <= OWN_THREADS
    assert "threads.py" in using
