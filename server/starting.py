"""What an operator got wrong, found while the server starts: one typed error instead of a library's traceback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError

from server.errors import InvalidSettings
from server.settings import Settings
from steering.language.errors import TrimtabError

# What libraries raise at files, numbers and names that they cannot use.
_CAUSES = (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError)
LONGEST = 300


class CannotStart(TrimtabError):
    """The server does not start: a model, a folder or a database cannot be used."""

    code: ClassVar[str] = "cannot_start"


@contextmanager
def said(what: str, *, param: str, fix: str) -> Iterator[None]:
    """Whatever fails inside is told in a line.

    Raises:
        CannotStart: `what`, and the first line of what the library said.
    """
    try:
        yield
    except TrimtabError:
        raise
    except _CAUSES as error:
        raise CannotStart(f"{what}: {first_line(error)}", param=param, fix=fix) from error


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = " ".join(text.splitlines()[0].split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def check_model(model: str) -> None:
    """Raises InvalidSettings for what is meant as a folder and is none; other names may be known to Hugging Face."""
    path = Path(model).expanduser()
    meant = model.startswith((".", "/", "~")) or model.count("/") > 1
    if meant and not path.exists():
        raise InvalidSettings(f"there is no folder {model}", param="model",
                              fix="Give the folder of a model in Hugging Face form, lab-dense, or a Hugging Face id.")
    if path.is_dir() and not (path / "config.json").exists():
        raise InvalidSettings(f"the folder {model} holds no config.json", param="model",
                              fix="Give the folder that Hugging Face's save_pretrained wrote.")


def prepare_data_dir(settings: Settings) -> None:
    """Make the folder of the server's state. Raises InvalidSettings where nothing can be written there."""
    folder = settings.data_dir
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InvalidSettings(f"nothing can be written to {folder}: {error.strerror}", param="data_dir",
                              fix="Give a folder that this user may write to: --data-dir.") from error
