"""Writes the generated pages: `python -m scripts.docs`. tests/test_docs.py fails when one of them is stale."""

from collections.abc import Callable
from pathlib import Path

from lab.real import page as real_model
from lab.replications import page
from scripts import clidoc, openapi, settingsdoc, specdoc

DOCS = Path(__file__).parent.parent / "docs"
PAGES: dict[str, Callable[[], str]] = {
    "spec.md": specdoc.document, "openapi.json": openapi.document, "cli.md": clidoc.document,
    "settings.md": settingsdoc.document, "replications.md": page.document,
    "real-model.md": real_model.document,
}

if __name__ == "__main__":
    for name, document in PAGES.items():
        (DOCS / name).write_text(document(), encoding="utf-8")
        print(f"wrote docs/{name}")
