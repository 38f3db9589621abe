"""Imports go one way, server -> vectors -> steering; clients import none of them; `__init__` files only list names.

Within a tree modules import each other without circles, and folders only those named for them. All imports count: of a
module, within its functions, and those for type checking alone, because two ideas that cannot be told apart do not
become two by importing each other later.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
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
    # What is claimed of a model that others made is tried on a server, through its client.
    "lab/real": {"lab", "vectors", "trimtab_client"},
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


# A folder or file, and which others of its tree it may import. The longest name that fits a module is its own.
STEERING = {
    "steering/language": set(),
    "steering/models": {"language"},
    "steering/artifacts": {"language"},
    "steering/ops": {"language", "models", "artifacts"},
    "steering/programs": {"language", "models", "artifacts", "ops"},
    "steering/residency": {"language", "ops", "programs"},
    "steering/acting": {"language", "models", "ops", "programs", "residency"},
    "steering/divergence.py": {"language"},
}
VECTORS = {
    "vectors/calibration.py": set(),
    "vectors/artifact.py": {"calibration.py"},
    "vectors/checks.py": {"artifact.py"},
    "vectors/extras.py": set(),
    "vectors/placebo.py": set(),
    "vectors/reconstruction.py": set(),
    "vectors/storage_errors.py": set(),
    "vectors/locks.py": set(),
    "vectors/scratch.py": {"locks.py", "storage_errors.py"},
    "vectors/library": {"artifact.py", "calibration.py", "checks.py", "storage_errors.py"},
    "vectors/formats": {"artifact.py", "scratch.py", "storage_errors.py"},
    "vectors/evaluate/graders": {"extras.py"},
    "vectors/extract": {"artifact.py", "extras.py", "placebo.py", "scratch.py", "evaluate/graders"},
    "vectors/patching": {"extract"},
    "vectors/porting": {"artifact.py", "extract"},
    "vectors/stacks": {"extract"},
    "vectors/calibrate": {"artifact.py", "calibration.py", "extras.py", "extract", "placebo.py"},
    "vectors/evaluate": {"extras.py", "extract", "calibrate", "evaluate/graders"},
}
GROUND = {"errors.py", "threads.py", "shelf.py"}
ENGINES = {"engines", "engines/transformers", "engines/vllm"}
SERVER = {
    "server/errors.py": set(),
    "server/threads.py": {"errors.py"},
    "server/shelf.py": set(),
    "server/settings_file.py": {"errors.py"},
    "server/settings.py": {"errors.py", "settings_file.py"},
    "server/starting.py": {"errors.py", "settings.py"},
    "server/checkpoints": set(),
    "server/engines": GROUND,
    "server/engines/transformers": {*GROUND, "engines"},
    "server/engines/vllm": {*GROUND, "engines"},
    "server/observability": {*GROUND, "engines"},
    "server/text": GROUND,
    "server/effects": {*GROUND, "engines", "observability"},
    "server/history": {*GROUND, "engines", "observability"},
    "server/identity": {*GROUND, "observability"},
    "server/rollouts": {*GROUND, "observability", "effects"},
    "server/http": {*GROUND, "settings.py", "starting.py", "observability", "identity"},
    "server/background": {*GROUND, "observability"},
    "server/batches": {*GROUND, "identity"},
    "server/activations": GROUND,
    "server/requests": {*GROUND, "settings.py", "engines", "observability", "text", "effects", "history", "background",
                        "batches", "identity", "rollouts", "activations"},
    "server/workbench": {*GROUND, "activations", "engines", "text", "effects", "background", "requests"},
    "server/api": {*GROUND, "activations", "engines", "observability", "text", "effects", "history", "http",
                   "background", "requests", "workbench", "identity", "rollouts"},
    "server/app.py": {*GROUND, "activations", "settings.py", "engines", "observability", "text", "effects", "history",
                      "http", "background", "batches", "requests", "api", "identity", "rollouts"},
    "server/boot.py": {"settings.py", "starting.py", *ENGINES, "observability", "text", "http", "app.py"},
    "server/verify": {*GROUND, "settings.py", *ENGINES, "boot.py"},
    "server/cli": {*GROUND, "settings.py", "starting.py", *ENGINES, "observability", "checkpoints", "boot.py",
                   "verify", "batches", "identity"},
}
TABLES = {"steering": STEERING, "vectors": VECTORS, "server": SERVER}

@cache
def modules(top: str) -> dict[str, Path]:
    """Dotted names of a tree's modules. A package stands for its `__init__`."""
    found = {}
    for path in sorted((ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, known: Mapping[str, Path]) -> Iterator[str]:
    """Which of the known modules a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in known:
                    yield name
                elif node.module in known:
                    yield node.module


@cache
def graph() -> dict[str, set[str]]:
    known = {name: path for top in TABLES for name, path in modules(top).items()}
    return {name: set(imported(path.read_text(), known)) - {name} for name, path in known.items()}


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def place(name: str, path: Path, table: Mapping[str, set[str]]) -> str:
    """The folder or file of the table in which a module stands."""
    file = path.relative_to(ROOT)
    fitting = [part for part in table if part == str(file) or file.is_relative_to(part)]
    return max(fitting, key=len, default=str(file))


def test_no_module_imports_itself_through_others() -> None:
    assert circle(graph()) == []


@pytest.mark.parametrize("top", TABLES)
def test_folders_import_only_what_stands_below_them(top: str) -> None:
    table, known = TABLES[top], modules(top)
    wrong = []
    for name, path in known.items():
        own = place(name, path, table)
        if path == ROOT / top / "__init__.py" or own not in table:
            continue
        for other in imported(path.read_text(), known):
            there = place(other, known[other], table)
            if there != own and there.removeprefix(f"{top}/") not in table[own]:
                wrong.append(f"{own}: {name} -> {other}")
    assert wrong == []


@pytest.mark.parametrize("top", TABLES)
def test_every_module_has_its_place(top: str) -> None:
    table = TABLES[top]
    lost = [name for name, path in modules(top).items()
            if place(name, path, table) not in table and path != ROOT / top / "__init__.py"]
    assert lost == []


@pytest.mark.parametrize("top", TABLES)
def test_the_table_has_no_circle_and_names_what_there_is(top: str) -> None:
    table = TABLES[top]
    assert circle({part: {f"{top}/{other}" for other in below} for part, below in table.items()}) == []
    assert {f"{top}/{other}" for below in table.values() for other in below} <= set(table)
    assert [part for part in table if not (ROOT / part).exists()] == []


def test_the_checks_of_the_graph_see_what_they_look_for() -> None:
    known = {"server.a": Path(), "server.b": Path(), "server": Path()}
    source = "if TYPE_CHECKING:\n    from server import a\n\ndef f():\n    import server.b"
    assert set(imported(source, known)) == {"server.a", "server.b"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
