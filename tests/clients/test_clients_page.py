"""The table of docs/clients.md: each row names a test that exists, and each test of a published client has a row."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
REAL = ROOT / "tests/clients/real"
PAGE = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
# A cell is "yes", or says with which error the server refuses.
CELL = re.compile(r"yes|`[a-z_]+`: .+")


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert lines[0].split("|")[3:5] == [" embedded ", " vLLM "]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def written() -> set[str]:
    return {f"{path.name}::{node.name}" for path in REAL.glob("test_*.py")
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")}


def test_rows_and_tests_are_the_same() -> None:
    named = {row[-1].strip("`| ") for row in rows()}
    assert len(rows()) >= 12 and named == written()


def test_every_cell_says_yes_or_why_not() -> None:
    codes = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    for row in rows():
        for cell in row[2:4]:
            assert CELL.fullmatch(cell), row
            assert cell == "yes" or f"| {cell.split(':')[0]} |" in codes, row


def test_every_client_has_its_lines() -> None:
    for row in rows():
        client = row[0].split(",")[0].split(" (")[0].removeprefix("Vercel ")
        assert client in PAGE.partition("## Three lines each")[2], client
