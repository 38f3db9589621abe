"""`python -m scripts.openapi`: write docs/openapi.json, the description of the HTTP API."""

import json
from pathlib import Path

from server.app import routed

PATH = Path("docs/openapi.json")


def document() -> str:
    """The same for every server: it depends on the routes alone, not on settings or the loaded model."""
    return json.dumps(routed().openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
