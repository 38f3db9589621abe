"""Parts of the command line that need no server."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from server.cli import app, bundled, examples
from server.cli.bundled import bundled_models, locate_model
from server.cli.capabilities import ranges
from server.cli.examples import load_examples
from server.cli.findings import check_library, check_packages, check_port
from server.cli.inprocess import running
from server.cli.steer import contrasted, steering_of
from server.settings import Settings
from steering.artifacts.payload import Payload
from steering.language.errors import EngineUnavailable, InvalidSpec, NotFound
from vectors.artifact import Metadata
from vectors.formats import get_format
from vectors.library import Filter, Library


@pytest.mark.parametrize(("written", "expected"), [
    ("cheerful", {"artifact": "cheerful"}),
    ("cheerful@3=1.5", {"artifact": "cheerful@3", "strength": 1.5}),
    ("cheerful=-2rel", {"artifact": "cheerful", "strength": {"value": -2.0, "unit": "rel"}}),
    ("a.b-c=+.5sigma", {"artifact": "a.b-c", "strength": {"value": 0.5, "unit": "sigma"}}),
    ("a=1e-3", {"artifact": "a", "strength": 0.001}),
])
def test_steering_is_read_from_the_command_line(written: str, expected: dict[str, Any]) -> None:
    assert steering_of([written]) == {"interventions": [expected]}


@pytest.mark.parametrize("written", ["", "=2", "a=", "a=x", "a=1=2", "a=1 rel", "a=nan", "a=1REL"])
def test_other_forms_are_refused(written: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        steering_of([written])
    assert refused.value.param == "--steer"


def test_nothing_given_is_no_steering() -> None:
    assert steering_of(None) is None
    assert steering_of([], "calm") == {"interventions": [], "preset": "calm"}


def test_a_contrast_is_read_from_the_command_line() -> None:
    steering = {"artifact": "calm"}
    assert contrasted(steering, None, 0.1, 0.5) == steering and contrasted(None, None, 0.1, 0.5) is None
    assert contrasted(steering, ["untouched"], 0.2, 1.0) == {
        **steering, "contrast": {"weak": {"interventions": []}, "alpha": 0.2, "beta": 1.0}}
    assert contrasted(None, ["sad=2", "calm"], 0.1, 0.5) == {"contrast": {
        "weak": {"interventions": [{"artifact": "sad", "strength": 2.0}, {"artifact": "calm"}]}, "alpha": 0.1,
        "beta": 0.5}}
    with pytest.raises(InvalidSpec) as refused:
        contrasted(None, ["sad="], 0.1, 0.5)
    assert refused.value.param == "--weak"


@pytest.mark.parametrize(("numbers", "text"), [([0, 1, 2, 5], "0-2, 5"), ([3], "3"), ([], ""), ([4, 2, 3], "2-4")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_models_are_found_by_name() -> None:
    assert "lab-dense" in bundled_models()
    assert (Path(locate_model("lab-dense")) / "config.json").exists()
    assert locate_model("some/hub-id") == "some/hub-id"
    with pytest.raises(NotFound, match="lab-nothing"):
        locate_model("lab-nothing")


@pytest.fixture
def library(tmp_path: Path) -> Any:
    opened = Library.open(f"sqlite:///{tmp_path / 'l.db'}", str(tmp_path / "blobs"))
    yield opened
    opened.close()


def write_bundle(folder: Path, value: float, **fields: str) -> None:
    metadata = Metadata.parse({"name": "cheerful", "kind": "vector", "op": "add", "site": "resid_post",
                               "tags": ["bundled"], **fields})
    payload = Payload.build("vector", {1: {"vector": torch.full((4,), value)}})
    place = folder / "artifacts" / "lab-x"
    place.mkdir(parents=True, exist_ok=True)
    (place / "cheerful.safetensors").write_bytes(get_format("safetensors").write(metadata, payload))
    (place / "presets.json").write_text(json.dumps([
        {"name": "happy", "description": "d", "spec": {"interventions": [{"artifact": "cheerful@production"}]}}]))


def test_examples_are_loaded_once_and_anew_when_they_change(tmp_path: Path, library: Library,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "folder", lambda kind: tmp_path / kind)
    marker = tmp_path / "marker"
    write_bundle(tmp_path, 1.0)
    assert load_examples(library, "lab-x", marker) == ["cheerful@1", "happy@1"]
    assert library.resolve("cheerful@production").version == 1
    library.presets.delete("happy")
    assert load_examples(library, "lab-x", marker) == []
    # A newer bundle brings what is not there, and neither moves nor versions what is.
    write_bundle(tmp_path, 2.0)
    assert load_examples(library, "lab-x", marker) == ["happy@2"]
    assert [one.version for one in library.versions("cheerful")] == [1]


def test_a_users_own_production_version_stays(tmp_path: Path, library: Library,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "folder", lambda kind: tmp_path / kind)
    own = library.create(Metadata.parse({"name": "cheerful", "kind": "vector", "op": "add", "site": "resid_post"}),
                         Payload.build("vector", {1: {"vector": torch.ones(4)}}))
    library.set_alias("cheerful", "production", own.version)
    write_bundle(tmp_path, 3.0)
    assert load_examples(library, "lab-x", tmp_path / "marker") == ["happy@1"]
    assert [one.ref for one in library.versions("cheerful")] == [own.ref]


def test_an_example_stands_beside_what_another_model_has_of_its_name(tmp_path: Path, library: Library,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "folder", lambda kind: tmp_path / kind)
    write_bundle(tmp_path, 3.0, fingerprint="a" * 64)
    other = {"name": "cheerful", "kind": "vector", "op": "add", "site": "resid_post", "fingerprint": "b" * 64}
    payload = Payload.build("vector", {1: {"vector": torch.ones(4)}})
    library.create(Metadata.parse(other), payload)
    assert load_examples(library, "lab-x", tmp_path / "marker") == ["cheerful@1", "happy@1"]
    for model in ("a" * 64, "b" * 64):
        library.serve(model)
        assert library.resolve("cheerful").metadata.fingerprint == model
        assert [one.metadata.fingerprint for one in library.list().items] == [model]
        assert len(library.list(Filter(everything=True)).items) == 2
    assert library.presets.list().items == [] and len(library.presets.list(everything=True).items) == 1


def test_a_model_without_examples_has_none(tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "folder", lambda kind: tmp_path / kind)
    assert load_examples(library, "lab-y", tmp_path / "marker") == []


def test_doctor_sees_a_taken_port_and_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (finding,) = check_port(Settings(port=port))
        assert finding.fix is not None
        done = CliRunner().invoke(app, ["doctor", "--skip-model", "--port", str(port)])
    assert done.exit_code == 1
    assert "--port 8001" in done.output
    (free,) = check_port(Settings(port=port))
    assert free.good


def test_doctor_sees_damaged_numbers(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    library = Library.open(settings.library_database_url, settings.library_blob_url)
    library.create(Metadata.parse({"name": "a", "kind": "vector", "op": "add", "site": "resid_post"}),
                   Payload.build("vector", {1: {"vector": torch.ones(4)}}))
    library.close()
    assert [finding.good for finding in check_library(settings)] == [True]
    (blob,) = [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    (finding,) = check_library(settings)
    assert finding.fix is not None
    assert "a@1" in finding.found


def test_doctor_sees_a_library_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (finding,) = check_library(Settings(data_dir=tmp_path / "file"))
    assert finding.fix is not None


def test_doctor_sees_a_package_of_the_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(finding.good for finding in check_packages())
    monkeypatch.setattr("server.cli.findings.requires", lambda _: ["pytest>=1", "typer<0.1", "no-such-thing-at-all>=2"])
    assert [(f.subject, f.good) for f in check_packages()] == [("typer", False), ("no-such-thing-at-all", False)]


def test_an_app_that_does_not_start_is_an_error_and_not_a_hang() -> None:
    from fastapi import FastAPI

    async def broken(app: FastAPI) -> Any:
        raise RuntimeError("no")
        yield

    with pytest.raises(EngineUnavailable), running(FastAPI(lifespan=broken)):
        pytest.fail("it says that it runs")


def test_help_does_not_load_torch() -> None:
    code = "import sys, server.cli; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False)
    assert done.returncode == 0


def test_folder_is_that_of_the_lab_package() -> None:
    assert bundled.folder("models").parent.name == "lab"
