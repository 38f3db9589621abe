"""What the packages import is declared in pyproject.toml, what is declared is imported, and the lock covers it."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from vectors.extras import ExtraMissing, extra

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOUSE = {"server", "steering", "vectors", "lab"}
# Declared and never imported by us, and what needs them.
USED_BY_OTHERS = {"accelerate": "transformers reads GGUF files with it",
                  "python-multipart": "FastAPI reads uploads with it"}
# Imported where it is there, and never required by us.
OPTIONAL = {"triton": "comes with CUDA builds of torch", "vllm": "an extra of its own, for each kind of machine",
            "opentelemetry": "a name that several packages of the extra otel share"}


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def imports(source: str) -> Iterator[str]:
    """Top-level names of what a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def imported() -> set[str]:
    """Distributions whose modules server, steering and vectors import, by their names on the registry."""
    found = {name for top in ("server", "steering", "vectors") for path in (ROOT / top).rglob("*.py")
             for name in imports(path.read_text())}
    known: Mapping[str, list[str]] = packages_distributions()
    outside = found - HOUSE - set(OPTIONAL) - set(sys.stdlib_module_names)
    return {name_of(known.get(name, [name])[0]) for name in outside}


def declared(*extras: str) -> set[str]:
    lines = list(PROJECT["project"]["dependencies"])
    for name in extras:
        lines += PROJECT["project"]["optional-dependencies"][name]
    return {name_of(line) for line in lines}


def test_every_import_is_declared() -> None:
    assert imported() - declared("plots", "probes") == set()


def test_everything_declared_is_imported() -> None:
    assert declared("plots", "probes") - imported() == set(USED_BY_OTHERS)


@pytest.mark.parametrize("module,name", [("matplotlib", "plots"), ("sklearn", "probes")])
def test_libraries_of_an_extra_are_imported_where_their_absence_is_told(module: str, name: str) -> None:
    """At the top of a module the import would fail with the module, and with it the server."""
    users = [path for top in ("server", "steering", "vectors") for path in (ROOT / top).rglob("*.py")
             if module in set(imports(path.read_text()))]
    assert users
    for path in users:
        tree = ast.parse(path.read_text())
        guarded = {node for within in ast.walk(tree)
                   if isinstance(within, ast.With) and f"extra('{name}')" in ast.unparse(within.items[0])
                   or isinstance(within, ast.If) and ast.unparse(within.test) == "TYPE_CHECKING"
                   for node in ast.walk(within)}
        bare = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
                and module in set(imports(ast.unparse(node))) and node not in guarded]
        assert bare == [], f"{path.relative_to(ROOT)} imports {module} outside extra({name!r})"


def test_what_an_extra_would_install_is_named() -> None:
    with pytest.raises(ExtraMissing, match="no_such_library") as caught, extra("plots"):
        __import__("no_such_library")
    assert "trimtab[plots]" in str(caught.value.fix)


def test_the_lock_has_every_requirement_with_a_hash_and_leaves_torch_to_the_machine() -> None:
    blocks = re.split(r"\n(?=[a-z])", (ROOT / "requirements.lock").read_text())[1:]
    locked = {name_of(block) for block in blocks}
    assert declared("plots", "probes", "postgresql", "s3") - {"torch", "trimtab-client"} <= locked
    assert "torch" not in locked
    assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []


def test_a_wheel_has_the_models_and_types_and_neither_corpora_nor_pictures() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert {"server", "steering", "vectors", "lab/models", "lab/artifacts"} <= set(included)
    assert [path for path in included if path.startswith("lab/") and not (ROOT / path).exists()] == []
    files = [path for name in included for path in [ROOT / name, *(ROOT / name).rglob("*")]]
    assert [path for path in files if path.suffix in (".png", ".svg", ".jsonl", ".txt")] == []
    assert all((ROOT / top / "py.typed").exists() for top in ("server", "steering", "vectors"))
