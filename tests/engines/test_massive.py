"""What an engine finds of massive activations, against plain Hugging Face hidden states."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab import model_path
from server.checkpoints.cache import ModelCache
from server.checkpoints.progress import silent
from server.checkpoints.ready import make_ready
from server.engines import massive
from server.engines.massive import FILE, LENGTH, TEXTS, massive_of
from server.settings import load_settings
from steering.language.errors import EngineUnavailable
from steering.models.massive import RATIO
from tests.tiny import tiny

BEGIN, DIM = 3, 5


def encode(text: str) -> list[int]:
    """Letters as tokens, behind one that begins every text and one that stands in some."""
    return [BEGIN, *(8 + ord(letter) % 50 for letter in text[:10]), *([BEGIN] if "," in text else [])]


def hidden(model: Any, ids: list[list[int]]) -> list[np.ndarray]:
    """Of each text the stream after every block, `[layers, T, d]`, by Hugging Face alone. The last entry of what it
    tells is behind the final norm, so that block is read by a hook."""
    found: list[np.ndarray] = []
    last: list[torch.Tensor] = []
    blocks = model.model.layers
    hook = blocks[-1].register_forward_hook(
        lambda module, given, out: last.append(out[0] if isinstance(out, tuple) else out))
    for text in ids:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states
        found.append(torch.cat([*states[1:-1], last[-1].reshape(states[1].shape)]).numpy())
    hook.remove()
    return found


def by_hand(model: Any, ids: list[list[int]]) -> dict[int, dict[int, float]]:
    """Dims of the first position whose size is over RATIO times the median there in 9 of 10 texts, and their mean."""
    first = np.stack([one[:, 0] for one in hidden(model, ids)])
    ratio = np.abs(first) / np.median(np.abs(first), axis=-1, keepdims=True)
    often = (ratio > RATIO).mean(axis=0) >= 0.9
    return {n: {int(d): float(first[:, n, d].mean()) for d in np.flatnonzero(often[n])} for n in range(len(often))
            if often[n].any()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose first token has one huge entry."""
    folder = tmp_path_factory.mktemp("planted")
    model = tiny("qwen3")
    with torch.no_grad():
        model.model.embed_tokens.weight[BEGIN, DIM] = 2000 * model.model.embed_tokens.weight.abs().median()
    model.save_pretrained(folder)
    return folder


async def test_planted_ones_are_those_of_hugging_face_and_are_found_once(start_engine: Any, planted: Path,
                                                                         tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start_engine("qwen3", model=str(planted), cache_dir=tmp_path)
    found = await massive_of(engine, encode)
    assert found is not None
    wanted = by_hand(AutoModelForCausalLM.from_pretrained(planted).eval(), [encode(text) for text in TEXTS])
    assert wanted and all(DIM in dims for dims in wanted.values())
    assert {n: set(one.first) for n, one in found.layers.items()} == {n: set(dims) for n, dims in wanted.items()}
    for n, dims in wanted.items():
        assert found.layers[n].first == pytest.approx(dims, rel=1e-4)
        assert found.layers[n].every == {} and found.layers[n].first_norm > 10 * found.layers[n].norm
    # The token carries it wherever it stands.
    assert found.tokens == {BEGIN: 1.0}

    monkeypatch.setattr(engine, "capture", None)
    assert await massive_of(engine, encode) == found
    monkeypatch.undo()
    (tmp_path / FILE).write_text(json.dumps({"other": {}}))
    assert await massive_of(engine, encode) == found
    (tmp_path / FILE).write_text("broken")
    assert await massive_of(engine, encode) == found


async def test_a_tiny_model_of_random_weights_and_one_that_cannot_be_asked(start_engine: Any,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start_engine("qwen3")
    found = await massive_of(engine, encode)
    assert found is not None and found.layers == {} and found.tokens == {} and found.texts == len(TEXTS)
    monkeypatch.setattr(massive, "MOST_BYTES", 1)
    assert await massive_of(engine, encode) == found

    async def down(*given: Any) -> Any:
        raise EngineUnavailable("it is down")

    monkeypatch.setattr(engine, "capture", down)
    assert await massive_of(engine, encode) is None


@pytest.mark.parametrize("name", ["lab-dense", "lab-moe"])
async def test_the_lab_models_have_none(start_engine: Any, name: str) -> None:
    engine = await start_engine(name, model=str(model_path(name)), model_id=name)
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    found = await massive_of(engine, lambda text: tokenizer(text)["input_ids"])
    assert found is not None and found.layers == {}


@pytest.mark.slow
async def test_those_of_smollm2_are_those_of_hugging_face(start_engine: Any) -> None:
    folder = make_ready("smollm2", ModelCache(load_settings().cache_folder), silent)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = await start_engine("smollm2", model=folder, model_id="smollm2", dtype="float32")
    found = await massive_of(engine, lambda text: tokenizer(text)["input_ids"])
    assert found is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [tokenizer(text)["input_ids"][:LENGTH] for text in TEXTS]
    wanted = by_hand(model, ids)
    assert wanted
    assert {n: set(one.first) for n, one in found.layers.items() if one.first} == {n: set(d) for n, d in wanted.items()}
    states = hidden(model, ids)
    for n, dims in wanted.items():
        assert found.layers[n].first == pytest.approx(dims, rel=1e-3)
        # Of an even number the lower of the two in the middle, as torch has it.
        lengths = sorted(float(np.linalg.norm(one[n, 0])) for one in states)
        assert found.layers[n].first_norm == pytest.approx(lengths[(len(lengths) - 1) // 2], rel=1e-3)
        assert found.layers[n].first_norm > 2 * found.layers[n].norm
    assert max(one.first_norm / one.norm for one in found.layers.values()) > 100
