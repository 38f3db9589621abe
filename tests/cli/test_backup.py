"""`trimtab backup` and `trimtab restore`, on the folders of two servers."""

from pathlib import Path

from typer.testing import CliRunner

from server.cli.main import app
from server.settings import load_settings
from tests.vectors.making import metadata, vector_payload
from vectors import Library


def opened(folder: Path) -> Library:
    settings = load_settings(data_dir=folder)
    return Library.open(settings.library_database_url, settings.library_blob_url)


def test_a_library_is_copied_from_one_folder_to_another(tmp_path: Path) -> None:
    library = opened(tmp_path / "a")
    library.create(metadata(), vector_payload(1))
    wanted = library.resolve("cheerful")
    library.close()
    file = str(tmp_path / "b.tar")
    done = CliRunner().invoke(app, ["backup", file, "--data-dir", str(tmp_path / "a")])
    assert done.exit_code == 0 and "1 blobs" in done.output, done.output
    for code in (0, 1):
        done = CliRunner().invoke(app, ["restore", file, "--data-dir", str(tmp_path / "c")])
        assert done.exit_code == code, done.output
    assert "holds something already" in done.output + str(done.exception)
    again = opened(tmp_path / "c")
    assert again.resolve("cheerful") == wanted and again.damaged() == []
    again.close()
