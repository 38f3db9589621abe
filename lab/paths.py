"""Where the committed models and datasets lie."""

from __future__ import annotations

from pathlib import Path

LAB_DIR = Path(__file__).resolve().parent
MODELS_DIR = LAB_DIR / "models"
DATA_DIR = LAB_DIR / "data"
MODEL_NAMES = ("lab-dense", "lab-moe")
# It calls tools, has a vocabulary of its own, and comes with the repository and not with the package.
TOOLS_MODEL = "lab-tools"


def model_path(name: str) -> Path:
    """The folder of a lab model; `name` is one of MODEL_NAMES or TOOLS_MODEL."""
    if name not in (*MODEL_NAMES, TOOLS_MODEL):
        raise ValueError(f"no bundled model is called {name!r}; there are {', '.join(MODEL_NAMES)}")
    return MODELS_DIR / name
