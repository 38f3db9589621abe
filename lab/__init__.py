"""The lab: reference models whose behaviour is known, their corpus, training and tests.

Importing this package loads no torch. Submodules: `corpus` (generator and scorers), `datasets`
(what steering methods read), `tokenizer`, `models`, `train`, `evaluate`, `report`.
"""

from lab.paths import DATA_DIR, MODEL_NAMES, MODELS_DIR, TOOLS_MODEL, model_path

__all__ = ["DATA_DIR", "MODELS_DIR", "MODEL_NAMES", "TOOLS_MODEL", "model_path"]
