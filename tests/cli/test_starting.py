"""What an operator got wrong is three clean lines and exit code 1, before a model is loaded where that can be told."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab import model_path
from server.cli import app


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.boot.build", lambda *_: pytest.fail("the model was loaded"))


def refusal(folder: Path, *arguments: str, data_dir: Path | None = None) -> str:
    """Standard error of a `trimtab serve` that does not start, without its first line."""
    result = CliRunner().invoke(app, ["serve", *arguments, "--data-dir", str(data_dir or folder / "data"),
                                      "--no-examples"])
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 1, (result.exit_code, result.output, result.exception)
    assert len(lines) in (2, 3) and lines[0].startswith("Loading ") and lines[1].startswith("error "), lines
    return "\n".join(lines[1:])


def test_a_taken_port(tmp_path: Path, never_loaded: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(tmp_path, "lab-dense", "--port", str(port))
    assert f"port {port} cannot be listened on: Address already in use" in said and "(port)" in said


@pytest.mark.parametrize(("model", "words"), [("./nowhere", "there is no folder ./nowhere"),
                                              ("EMPTY", "holds no config.json")])
def test_no_model(tmp_path: Path, never_loaded: None, model: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    said = refusal(tmp_path, model.replace("EMPTY", str(tmp_path / "empty")), "--port", "0")
    assert words in said and "(model)" in said


def test_a_data_folder_that_is_none(tmp_path: Path, never_loaded: None) -> None:
    (tmp_path / "file").touch()
    assert "nothing can be written" in refusal(tmp_path, "lab-dense", "--port", "0", data_dir=tmp_path / "file")


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def quantize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))


def estrange(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "martian"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("spoil", "words"), [(truncate, "header"), (quantize, "AWQ"), (estrange, "martian")])
def test_a_checkpoint_that_cannot_be_loaded(tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_path("lab-dense"), folder)
    spoil(folder)
    said = refusal(tmp_path, str(folder), "--port", "0")
    assert words in said and "(model)" in said


def test_an_engine_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(self: object) -> None:
        raise RuntimeError("no such device\nand more of that")

    monkeypatch.setattr("server.engines.transformers.engine.TransformersEngine.start", start)
    assert "the server cannot start: no such device (" in refusal(tmp_path, "lab-dense", "--port", "0")
