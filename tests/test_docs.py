"""The generated pages are those that the code would write now; links lead somewhere; every error code is explained."""

import re
from pathlib import Path

import pytest

from scripts.docs import DOCS, PAGES
from server import app  # noqa: F401  loads every module that declares errors
from steering.language.errors import TrimtabError

ROOT = DOCS.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_fresh(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Help texts must not depend on the terminal or on what a developer has set.
    monkeypatch.setenv("COLUMNS", "80")
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), "run make docs"


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"],
                         ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target, _ in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def subclasses(kind: type[TrimtabError]) -> set[type[TrimtabError]]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def test_every_error_code_is_explained() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    codes = {error.code for error in subclasses(TrimtabError)
             if error.__module__.split(".")[0] in ("steering", "vectors", "server")}
    assert len(codes) > 20
    assert sorted(code for code in codes if f"`{code}`" not in page) == []
