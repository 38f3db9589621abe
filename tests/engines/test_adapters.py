"""Adapters on disk: what is served, what is refused, and how long their files stay. No engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from server.engines.adapters import Adapters
from server.errors import InvalidAdapter, ModelNotFound
from tests.engines.peft import write_adapter
from tests.tiny import tiny

RANK = 8


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("qwen3")


@pytest.fixture
def folder(tmp_path: Path, model: Any) -> Path:
    return write_adapter(tmp_path / "adapter", model, 0)


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensor(name: str, *, without: str = "") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        first = next(iter(tensors.values())).clone()
        save_file({own: value for own, value in tensors.items() if own != without} | ({name: first} if name else {}),
                  folder / "adapter_model.safetensors")

    return change


def file(name: str, content: bytes | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return change


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (config(use_dora=True), "use_dora=True"), (config(bias="all"), "bias=all"), (config(peft_type="IA3"), "peft_type"),
    (config(modules_to_save=["lm_head"]), "modules_to_save"), (config(init_lora_weights="pissa"), "init_lora_weights"),
    (config(r=16), "rank is over 8"), (config(rank_pattern={"q_proj": 32}), "rank is over 8"),
    (config(r="4"), "adapter_config.json cannot be read"), (config(lora_alpha=float("nan")), "cannot be read"),
    (tensor("base_model.model.lm_head.lora_A.weight"), "lm_head"),
    (tensor("base_model.model.model.embed_tokens.lora_embedding_A"), "embed_tokens"),
    (tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"), "lora_magnitude_vector"),
    (tensor("", without=FIRST), "both halves"),
    (file("adapter_config.json", None), "adapter_config.json cannot be read: No such file"),
    (file("adapter_config.json", b"{" * 100_000), "adapter_config.json cannot be read"),
    (file("adapter_model.safetensors", None), "adapter_model.safetensors cannot be read: No such file"),
    (file("adapter_model.safetensors", b"PK\3\4pickle"), "adapter_model.safetensors cannot be read")]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_would_be_served_otherwise_than_it_was_trained_is_refused(folder: Path, change: Callable[[Path], None],
                                                                       said: str) -> None:
    change(folder)
    adapters = Adapters()
    with pytest.raises(InvalidAdapter, match=said):
        adapters.copy("name", folder, RANK)
    assert not len(adapters)
    adapters.close()


def test_files_are_a_copy_that_stays_as_long_as_a_request_uses_it(folder: Path, model: Any) -> None:
    adapters = Adapters()
    first = adapters.copy("name", folder, RANK)
    adapters.add(first)
    write_adapter(folder, model, 1)
    second = adapters.copy("name", folder, RANK)
    assert first.digest != second.digest and first.number != second.number
    with adapters.used(first):
        adapters.add(second)
        assert adapters.get("name") is second and first.folder.exists()
        with pytest.raises(ModelNotFound, match="was unloaded"), adapters.used(first):
            pass
    assert not first.folder.exists() and second.folder.exists()
    assert adapters.remove("name") is second and adapters.remove("name") is None
    assert not second.folder.exists() and [*adapters] == []
    adapters.close()
    assert not second.folder.parent.exists()


def test_an_adapter_of_the_same_files_has_the_same_digest(folder: Path) -> None:
    adapters = Adapters()
    one, other = (adapters.copy(name, folder, RANK) for name in ("one", "other"))
    assert one.digest == other.digest and one.ref != other.ref
    adapters.close()
