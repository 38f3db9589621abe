"""The two sides of the vLLM engine know each other only by what stands beside them."""

import ast
from pathlib import Path

PACKAGE = "server.engines.vllm"
FOLDER = Path(__file__).parents[3] / PACKAGE.replace(".", "/")


def imports() -> dict[str, set[str]]:
    """Modules of the package that each one imports, wherever in its code."""
    found = {}
    for path in FOLDER.rglob("*.py"):
        name = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
        used = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGE):
                inside = node.module.removeprefix(PACKAGE).lstrip(".")
                used |= {inside} | {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
        found[name] = used
    return {name: {other for other in used if other in found} for name, used in found.items()}


def test_neither_side_imports_the_other() -> None:
    graph = imports()
    assert {name.split(".")[0] for name in graph} >= {"host", "worker", "wire", "plugin"}
    for side, other in (("host.", "worker."), ("worker.", "host.")):
        wrong = {name: [used for used in graph[name] if used.startswith(other)] for name in graph
                 if name.startswith(side)}
        assert not any(wrong.values()), wrong
    shared = {name: used for name, used in graph.items() if "." not in name and name != "plugin"}
    assert not [used for names in shared.values() for used in names if "." in used], shared
