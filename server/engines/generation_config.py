"""How a model's own generation config chooses tokens where a request does not say."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from transformers.utils import cached_file

log = structlog.get_logger(__name__)
FILE = "generation_config.json"


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request that leaves these out gets. Without a config of the model's own nothing is held back."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


# What a request may ask for; a config that asks for something else is left out, and said so.
_ALLOWED: Mapping[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 <= value <= 2, "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: value == int(value) and 0 <= value <= 2**24, "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: 0.01 <= value <= 10}


def defaults_of(model: str) -> SamplingDefaults:
    """Those of the folder or the Hugging Face name `model`, as vLLM reads them: whether the config says `do_sample`
    does not matter."""
    found: dict[str, Any] = {}
    for name, value in _config(model).items():
        if name not in _ALLOWED or value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if number and _ALLOWED[name](value):
            found[name] = int(value) if name == "top_k" else float(value)
        else:
            log.warning("a field of the model's generation config is left out, because no request may ask for it",
                        field=name, value=str(value)[:80])
    return SamplingDefaults(**found)


def _config(model: str) -> dict[str, Any]:
    """Empty where there is none."""
    try:
        path = Path(model) / FILE if Path(model).is_dir() else cached_file(
            model, FILE, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        read = {} if path is None or not Path(path).is_file() else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("the model's generation config cannot be read, so requests get no defaults of it",
                    error=str(error)[:200])
        return {}
    return read if isinstance(read, dict) else {}
