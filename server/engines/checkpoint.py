"""The fingerprint of a checkpoint that lies on the disk, read once and then remembered.

The fingerprint is over every weight, and vLLM reads the weights itself. So that a start does not read a large
checkpoint twice, and one of the embedded engine does not hash all of it again, what was found is kept in a file beside
the models that Trimtab caches. It is found again by the names, sizes and times of the checkpoint's files, the version
of transformers (which names the weights) and the code that hashes them. A file that is changed and keeps both its size
and its time is taken for the old one.
"""

import hashlib
import json
import os
from pathlib import Path

import structlog
import transformers
from transformers.utils import cached_file

from steering.models import fingerprints

log = structlog.get_logger(__name__)
# Files that a checkpoint is read from; all others, a README say, may change.
KINDS = (".safetensors", ".bin", ".json", ".pt", ".pth", ".gguf")
FILE = "fingerprints.json"
# The oldest are forgotten.
MOST = 256


class KnownFingerprints:
    """What was found before, in one file of a folder.

    Args:
        folder: None for nowhere, so that every start reads the weights.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / FILE

    def get(self, model: str) -> str | None:
        """The fingerprint of `model`, a folder or a name at Hugging Face, where its files are those of before."""
        if self._path is None or (key := checkpoint_key(model)) is None:
            return None
        return self._read(self._path).get(key)

    def keep(self, model: str, found: str) -> None:
        """Remember a fingerprint. Where it cannot be written the next start reads the weights again."""
        if self._path is None or (key := checkpoint_key(model)) is None:
            return
        known = {**self._read(self._path), key: found}
        part = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(dict(list(known.items())[-MOST:])))
            part.replace(self._path)
        except OSError as error:
            log.warning("the model's fingerprint could not be kept; the next start reads the weights again",
                        file=str(self._path), error=str(error))

    @staticmethod
    def _read(path: Path) -> dict[str, str]:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            # There is none yet, or it cannot be read; the weights can.
            return {}
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def checkpoint_key(model: str) -> str | None:
    """What stands for the files of a checkpoint as they are; None where there is no folder that holds them."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            found = cached_file(model, "config.json", local_files_only=True)
        except OSError:
            return None
        if found is None:
            return None
        folder = Path(found).parent
    files = []
    for path in sorted(folder.iterdir()):
        if path.suffix in KINDS and path.is_file():
            state = path.stat()
            files.append([path.name, state.st_size, state.st_mtime_ns])
    code = hashlib.sha256(Path(fingerprints.__file__).read_bytes()).hexdigest()
    given = [str(folder.resolve()), files, transformers.__version__, code]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()
