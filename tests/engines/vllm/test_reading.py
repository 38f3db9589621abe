"""What is read of a checkpoint before vLLM loads it, with its weights and where their fingerprint is known."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lab import model_path
from server.engines.checkpoint import FILE, KnownFingerprints
from server.engines.vllm.host import reading
from server.engines.vllm.host.reading import read_model
from steering.language.errors import UnsupportedModel
from steering.models.families import FAMILIES
from tests.engines.vllm.conftest import options
from tests.sweeps import sweep_of
from tests.tiny import tiny


def unread(model: str) -> Any:
    raise AssertionError("the weights were read again")


QUICK = ("llama", "qwen3_moe")


@pytest.mark.parametrize("family", sweep_of(*QUICK, slow=[
    name for name, family in FAMILIES.items() if family.vllm is not None and name not in QUICK]))
def test_the_weights_are_read_once(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(tmp_path / "model")
    given = replace(options("lab-dense"), model=str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    without = read_model(replace(given, cache_dir=None))
    assert read_model(given) == without and without.end_ids == (2, 5)
    monkeypatch.setattr(reading, "_loaded", unread)
    assert read_model(given) == without
    with pytest.raises(AssertionError, match="read again"):
        read_model(replace(given, cache_dir=None))


@pytest.mark.parametrize("name", ["lab-dense", "lab-moe"])
def test_the_lab_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(options(name), cache_dir=tmp_path)
    first = read_model(given)
    monkeypatch.setattr(reading, "_loaded", unread)
    assert read_model(given) == first


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    """Of the same size; the time of the file tells."""
    tiny("qwen3").save_pretrained(tmp_path / "model")
    given = replace(options("lab-dense"), model=str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    first = read_model(given)
    path = tmp_path / "model" / "model.safetensors"
    before = path.stat()
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1.0
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert path.stat().st_size == before.st_size
    second = read_model(given)
    assert second.facts.fingerprint != first.facts.fingerprint
    assert second == read_model(replace(given, cache_dir=None))


def test_what_is_kept_may_be_lost(tmp_path: Path) -> None:
    """A file that cannot be read or written costs time alone, and the newest are kept."""
    known, file = KnownFingerprints(tmp_path), tmp_path / FILE
    folder = str(model_path("lab-dense"))
    for content in ("{", "[1]"):
        file.write_text(content)
        assert known.get(folder) is None
        known.keep(folder, content)
        assert known.get(folder) == content
    blocked = tmp_path / "file"
    blocked.write_text("")
    for other, model in ((KnownFingerprints(blocked / "folder"), folder), (KnownFingerprints(None), folder),
                         (known, "/nowhere/at-all")):
        other.keep(model, "found")
        assert other.get(model) is None


def test_no_model_stays_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="/nowhere"):
        read_model(replace(options("lab-dense"), model="/nowhere", cache_dir=tmp_path))
