"""Lines of Python by folder, without blanks, comments and docstrings, at another commit and in the working tree.

    python -m scripts.size BASE

The second table parts the lines by function, to tell code that grew from code that is new. A function or class is the
same if one of its name (`function`, `Class.method`) is in the same top-level folder at both commits, so one that was
renamed counts as gone and as new.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Not counted in the sum: they are allowed to grow.
APART = ("tests", "lab")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """How many lines have a token of code."""
    return len(_code_lines(source))


def _code_lines(source: str) -> set[int]:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(
                    first.value.value, str):
                lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def by_function(files: Iterable[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Of (path, source): lines per (top-level folder, function or class); what is in none stands under ""."""
    counts: Counter[tuple[str, str]] = Counter()
    for path, source in files:
        folder, lines = path.split("/")[0] if "/" in path else ".", _code_lines(source)
        if folder in APART:
            continue

        def count(node: ast.Module | ast.ClassDef, prefix: str, left: set[int], folder: str = folder) -> None:
            for inner in node.body:
                if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    first = min([inner.lineno, *(decorator.lineno for decorator in inner.decorator_list)])
                    own = left & set(range(first, (inner.end_lineno or first) + 1))
                    left -= own
                    if isinstance(inner, ast.ClassDef):
                        count(inner, f"{inner.name}.", own)
                    counts[folder, prefix + inner.name] += len(own)

        count(ast.parse(source), "", lines)
        counts[folder, ""] += len(lines)
    return counts


def by_folder(files: Iterable[tuple[str, str]]) -> Counter[str]:
    """Of (path, source): lines per top-level folder."""
    counts: Counter[str] = Counter()
    for path, source in files:
        counts[path.split("/")[0] if "/" in path else "."] += code_lines(source)
    return counts


def files_of(commit: str | None) -> Iterable[tuple[str, str]]:
    """Python files that git knows, at a commit or in the working tree."""
    listing = ["git", "ls-tree", "-r", "--name-only", commit] if commit else ["git", "ls-files"]
    for name in git(*listing[1:]).splitlines():
        path = ROOT / name
        if name.endswith(".py") and (commit or path.exists()):
            yield name, git("show", f"{commit}:{name}") if commit else path.read_text()


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main(base: str) -> None:
    before, now = by_folder(files_of(base)), by_folder(files_of(None))
    print(f"{'folder':12} {base[:12]:>12} {'now':>8} {'change':>8}")
    for folder in sorted(before | now):
        print(f"{folder:12} {before[folder]:12} {now[folder]:8} {now[folder] - before[folder]:+8}")
    old, new = (sum(count for folder, count in counts.items() if folder not in APART) for counts in (before, now))
    print(f"{'all but ' + ', '.join(APART):12} {old:12} {new:8} {new - old:+8}")
    print(f"\n{'folder':12} {'the same':>17} {'gone':>8} {'new':>8} {'in none':>17}")
    then, today = by_function(files_of(base)), by_function(files_of(None))
    total: Counter[str] = Counter()
    for folder in sorted({folder for folder, _ in then | today}):
        row = Counter({"none": today[folder, ""], "none was": then[folder, ""]})
        for name in {name for place, name in then | today if place == folder and name}:
            if (folder, name) not in today:
                row["gone"] += then[folder, name]
            elif (folder, name) not in then:
                row["new"] += today[folder, name]
            else:
                row["kept"], row["was"] = row["kept"] + today[folder, name], row["was"] + then[folder, name]
        total += row
        print(_parted(folder, row))
    print(_parted("all", total))


def _parted(name: str, row: Counter[str]) -> str:
    return (f"{name:12} {row['was']:7} -> {row['kept']:6} {row['gone']:8} {row['new']:8} "
            f"{row['none was']:7} -> {row['none']:6}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "main")
