"""Where the committed models and datasets lie."""

from __future__ import annotations

from pathlib import Path

LAB_DIR = Path(__file__).resolve().parent
MODELS_DIR = LAB_DIR / "models"
DATA_DIR = LAB_DIR / "data"
MODEL_NAMES = ("lab-dense", "lab-moe")


def model_path(name: str) -> Path:
    """The folder of a bundled model; `name` is one of MODEL_NAMES."""
    if name not in MODEL_NAMES:
        raise ValueError(f"no bundled model is called {name!r}; there are {', '.join(MODEL_NAMES)}")
    return MODELS_DIR / name
