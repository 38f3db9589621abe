"""Checkpoints that cannot be read are one sentence with a fix."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.engines.transformers.loading import load_model
from server.engines.transformers.options import EngineOptions
from steering.language.errors import UnsupportedModel
from tests.tiny import tiny


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return {**tiny("llama").config.to_dict(), "architectures": ["LlamaForCausalLM"]}


def refused(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel) as caught:
        load_model(EngineOptions(model=str(folder), model_id="x"))
    assert caught.value.param == "model" and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("quantisation", "why"), [
    ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, "requires"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "requires"),
    ({"quant_method": "homemade", "bits": 4}, "does not know this format")])
def test_quantised_weights_that_cannot_be_read(tmp_path: Path, config: dict[str, Any], quantisation: dict[str, Any],
                                               why: str) -> None:
    """An unknown format is refused too: its packed numbers would be taken for weights."""
    text = refused(tmp_path, {**config, "quantization_config": quantisation})
    assert f"quantised ({quantisation['quant_method']})" in text and why in text and "--engine vllm" in text


def test_plain_weights_that_are_missing_are_told_as_such(tmp_path: Path, config: dict[str, Any]) -> None:
    assert "quantised" not in refused(tmp_path, config)
