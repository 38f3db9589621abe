"""`trimtab backup` and `trimtab restore`: the library of the settings, database and numbers, as one file."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.config import ConfigFile
from server.cli.console import out
from server.settings import load_settings

if TYPE_CHECKING:
    from vectors.library.backup import Copied
    from vectors.library.blobs import BlobStore
    from vectors.library.database import Database

DATABASE = typer.Option(help="SQLAlchemy URL of the library; by default that of the settings.")
BLOBS = typer.Option(help="fsspec URL of the blobs; by default that of the settings.")
DATA_DIR = typer.Option(help="Folder of a server whose library is in it.")


def backup(file: Annotated[Path, typer.Argument(help="Where to write it. It is replaced once the backup is whole.")],
           database_url: Annotated[str | None, DATABASE] = None, blob_url: Annotated[str | None, BLOBS] = None,
           data_dir: Annotated[Path | None, DATA_DIR] = None, config: ConfigFile = None) -> None:
    """Copy the library of this machine's settings into a file, while servers use it."""
    # What reads libraries takes seconds to import, for which `--help` need not wait.
    from vectors.library.backup import back_up

    copied = _on_library(back_up, file, config, database_url, blob_url, data_dir)
    out.print(f"backed up {_told(copied)} to {file}", highlight=False, soft_wrap=True)


def restore(file: Annotated[Path, typer.Argument(help="What `trimtab backup` wrote, by this version or an older one.")],
            database_url: Annotated[str | None, DATABASE] = None, blob_url: Annotated[str | None, BLOBS] = None,
            data_dir: Annotated[Path | None, DATA_DIR] = None, config: ConfigFile = None) -> None:
    """Put a backup into a library that holds nothing yet, on SQLite or PostgreSQL, whichever it came from."""
    from vectors.library.backup import restore as put_back

    copied = _on_library(put_back, file, config, database_url, blob_url, data_dir)
    out.print(f"restored {_told(copied)}", highlight=False)


def _on_library(work: "Callable[[Database, BlobStore, Path], Copied]", file: Path, config: Path | None,
                database_url: str | None, blob_url: str | None, data_dir: Path | None) -> "Copied":
    from vectors.library.blobs import BlobStore
    from vectors.library.database import Database

    settings = load_settings(config=config, database_url=database_url, blob_url=blob_url, data_dir=data_dir)
    with closing(Database(settings.library_database_url, settings.database_wait_s)) as database:
        return work(database, BlobStore(settings.library_blob_url), file)


def _told(copied: "Copied") -> str:
    return f"{copied.rows:,} rows and {copied.blobs:,} blobs of {copied.nbytes:,} bytes"
