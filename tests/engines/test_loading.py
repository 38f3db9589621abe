"""Checkpoints that cannot be read are one sentence with a fix."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.engines.checkpoint import KnownFingerprints
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.loading import load_model
from server.engines.transformers.options import EngineOptions
from steering.language.errors import UnsupportedModel
from steering.models.fingerprints import fingerprint
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


class TestFingerprint:
    """It is found again by the checkpoint's files, so that the weights are not hashed at every start."""

    @pytest.fixture
    def options(self, tmp_path: Path) -> EngineOptions:
        tiny("llama").save_pretrained(tmp_path / "model")
        return EngineOptions(model=str(tmp_path / "model"), model_id="x", slots=2, cache_dir=tmp_path / "cache")

    def test_the_weights_are_hashed_once(self, options: EngineOptions, monkeypatch: pytest.MonkeyPatch) -> None:
        hashed: list[object] = []

        def counted(model: Any) -> str:
            hashed.append(model)
            return fingerprint(model)

        monkeypatch.setattr("server.engines.transformers.engine.fingerprint", counted)
        first = TransformersEngine(options).facts.fingerprint
        again = TransformersEngine(replace(options, dtype="bfloat16")).facts.fingerprint
        assert len(hashed) == 1 and again == first == fingerprint(tiny("llama"))
        # Other weights in the same place, and nowhere to keep it.
        tiny("llama", seed=1).save_pretrained(options.model)
        other = TransformersEngine(options).facts.fingerprint
        assert len(hashed) == 2 and other != first
        TransformersEngine(replace(options, cache_dir=None))
        assert len(hashed) == 3

    def test_what_float16_makes_of_the_numbers_is_kept_for_nobody(self, options: EngineOptions) -> None:
        TransformersEngine(replace(options, dtype="float16"))
        assert KnownFingerprints(options.cache_dir).get(options.model) is None
        plain = TransformersEngine(options).facts.fingerprint
        assert KnownFingerprints(options.cache_dir).get(options.model) == plain
