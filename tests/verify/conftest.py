"""A tiny model with the words of a lab model, for a command that wants a tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import model_path
from tests.tiny import tiny


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            lab = model_path("lab-dense")
            vocab_size = json.loads((lab / "config.json").read_text())["vocab_size"]
            tiny(family, vocab_size=vocab_size).save_pretrained(made[family])
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(lab / name, made[family])
        return made[family]

    return make
