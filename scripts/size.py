"""Lines of Python by folder, without blanks, comments and docstrings, at another commit and in the working tree.

    python -m scripts.size BASE
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
    """Lines on which a token of code stands."""
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
    return len(lines)


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


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "main")
