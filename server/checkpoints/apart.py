"""The conversion of a GGUF file in a process of its own, as its caller sees it. Imports no torch."""

import json
import subprocess
import sys
from pathlib import Path

from steering.language.errors import UnsupportedModel

REFUSED = 3


def convert_apart(source: Path, folder: Path, architecture: str) -> None:
    """`convert` in a process of its own.

    Raises:
        UnsupportedModel: transformers does not read this file, or Trimtab does not know the family.
    """
    done = subprocess.run([sys.executable, "-m", "server.checkpoints.convert", str(source), str(folder)],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 0:
        return
    lines = [line for line in (done.stdout if done.returncode == REFUSED else done.stderr).splitlines() if line.strip()]
    said = lines[-1] if lines else f"exit status {done.returncode}"
    reason = json.loads(said) if done.returncode == REFUSED else said
    raise UnsupportedModel(f"{source.name} (GGUF, architecture {architecture!r}) cannot be served: {reason}",
                           param="model", fix="Use the same model in Hugging Face form, or another one.")
