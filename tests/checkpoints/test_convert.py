"""A model that was turned from GGUF into a folder is the model that was written."""

import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.checkpoints.apart import convert_apart
from server.checkpoints.cache import ModelCache
from server.checkpoints.convert import convert, main
from server.checkpoints.gguf import check_gguf
from server.checkpoints.progress import silent
from server.checkpoints.ready import make_ready
from steering.language.errors import NotFound, UnsupportedModel
from tests.checkpoints.gguf_files import CHAT_TEMPLATE, MERGES, TOKENS, logits, tiny_llama, tiny_of, write_gguf

TEXT = [0, 40, 41, 50, 258, 77, 3]


@pytest.mark.parametrize(("kind", "dtype", "near"), [("F32", torch.float32, 1e-5), ("F16", torch.float16, 0.1),
                                                     ("Q8_0", torch.bfloat16, 0.4)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_holds_the_model(kind: str, dtype: torch.dtype, near: float, tied: bool, tmp_path: Path) -> None:
    made = tiny_llama(tie_word_embeddings=tied)
    state = {name: tensor for name, tensor in made.state_dict().items() if not (tied and name == "lm_head.weight")}
    made.state_dict = lambda *args, **kwargs: state  # type: ignore[method-assign]
    source = write_gguf(tmp_path / "tiny.gguf", made, kind)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(source, folder)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.dtype == dtype
    assert found.config.tie_word_embeddings is tied
    assert found.generation_config.eos_token_id == 1
    wanted, control = logits(made, TEXT), logits(tiny_llama(seed=1), TEXT)
    got = logits(found, TEXT)
    assert (got - wanted).abs().max() < near
    assert (got - control).abs().max() > 1.0


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_file_of_another_family_is_that_model(family: str, tmp_path: Path) -> None:
    """Biases of queries and keys (qwen2), their norms and a head width of its own (qwen3): what these families have
    besides a llama's tensors reaches the folder. The logits of other numbers are the control."""
    made = tiny_of(family)
    (tmp_path / "folder").mkdir()
    convert(write_gguf(tmp_path / "tiny.gguf", made, architecture=family), tmp_path / "folder")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert found.config.model_type == family
    got, wanted, control = (logits(model, TEXT) for model in (found, made, tiny_of(family, seed=1)))
    assert (got - wanted).abs().max() < 1e-4
    assert (got - control).abs().max() > 1.0


def test_the_folder_holds_the_tokenizer(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    (tmp_path / "folder").mkdir()
    convert(source, tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert MERGES == ("a b", "ab c")
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcab", add_special_tokens=False)["input_ids"]) == ["abc", "ab"]
    assert tokenizer.decode([TOKENS.index(c) for c in "Trim"]) == "Trim"
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|end|>", CHAT_TEMPLATE)


@pytest.mark.slow
def test_a_gguf_file_is_converted_once_and_found_under_its_name(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "my model.gguf", tiny_llama())
    steps: list[str] = []
    cache = ModelCache(tmp_path / "cache")
    first = make_ready(str(source), cache, lambda what, done, total: steps.append(what))
    assert Path(first).name == "my model"
    assert any("Hugging Face folder" in step for step in steps)
    made = (Path(first) / "model.safetensors").stat().st_mtime_ns
    steps.clear()
    assert make_ready(str(source), cache, lambda what, done, total: steps.append(what)) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == made
    assert not any("Hugging Face folder" in step for step in steps)
    # Other numbers under the same name are another model.
    other = write_gguf(tmp_path / "my model.gguf", tiny_llama(seed=1))
    assert make_ready(str(other), cache, silent) != first


def _kinds(folder: Path) -> dict[str, tuple[Path, str]]:
    def written(name: str, architecture: str, **fields: object) -> Path:
        writer = gguf.GGUFWriter(folder / name, architecture)
        for key, value in fields.items():
            place = key.replace("__", ".")
            writer.add_uint16(place, value) if isinstance(value, int) else writer.add_string(place, str(value))
        writer.add_tensor("direction.1", torch.ones(4).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / name

    text = folder / "text.gguf"
    text.write_text("not a model")
    cut = folder / "cut.gguf"
    cut.write_bytes(written("whole.gguf", "llama").read_bytes()[:40])
    return {"text": (text, "is no GGUF file"), "cut": (cut, "damaged GGUF"),
            "vector": (written("vector.gguf", "controlvector"), "control vector"),
            "adapter": (written("adapter.gguf", "llama", general__type="adapter"), "GGUF adapter"),
            "part": (written("part.gguf", "llama", split__count=3), "one of 3 parts")}


@pytest.mark.parametrize("kind", ["text", "cut", "vector", "adapter", "part"])
def test_what_is_no_whole_model_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path, said = _kinds(tmp_path)[kind]
    with pytest.raises(UnsupportedModel, match=said) as refused:
        check_gguf(path)
    assert path.name in refused.value.message
    assert refused.value.param == "model"


def test_an_architecture_that_transformers_does_not_read_is_refused_by_name(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The program that converts, in this process; its caller is handed what it printed."""
    source = write_gguf(tmp_path / "odd.gguf", tiny_llama(), architecture="rwkv7")
    assert check_gguf(source) == "rwkv7"
    monkeypatch.setattr(sys, "argv", ["convert", str(source), str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    done = subprocess.CompletedProcess([], int(str(ended.value)), capsys.readouterr().out, "noise")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(UnsupportedModel, match=r"odd\.gguf \(GGUF, architecture 'rwkv7'\) cannot be served: "
                                               "transformers cannot read it .*not supported") as refused:
        convert_apart(source, tmp_path / "folder", "rwkv7")
    assert "\n" not in refused.value.message


def test_a_conversion_that_dies_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for done, said in ((subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: full\n"), "MemoryError: full"),
                       (subprocess.CompletedProcess([], -9, "", ""), "exit status -9")):
        monkeypatch.setattr(subprocess, "run", lambda *args, done=done, **kwargs: done)
        with pytest.raises(UnsupportedModel, match=f"cannot be served: {said}"):
            convert_apart(tmp_path / "a.gguf", tmp_path, "llama")


def test_a_family_that_trimtab_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "star.gguf", tiny_llama(), architecture="starcoder2")
    with pytest.raises(UnsupportedModel, match="'starcoder2' is not known"):
        convert(source, tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file"):
        make_ready(str(tmp_path / "none.gguf"), ModelCache(tmp_path), silent)
