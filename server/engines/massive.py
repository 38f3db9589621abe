"""The massive activations of the served model, looked for once and then remembered by its fingerprint.

A few short texts go through the engine that serves, one pass or two, so what is found is what this engine computes. The
next start finds it in a file beside the models that Trimtab caches.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import structlog

from server.engines.base import Engine
from server.engines.data import CaptureRequest
from steering.language.errors import TrimtabError
from steering.models import massive
from steering.models.massive import Massive, find_massive

log = structlog.get_logger(__name__)
FILE = "massive.json"
# The oldest are forgotten.
MOST = 256
# Activations that are held at a time.
MOST_BYTES = 2**26
# Tokens of each text that are read.
LENGTH = 12
TEXTS = (
    "The old bridge was closed in March. Nobody knew why, but the trains kept running.",
    "She opened the letter, read it twice, and put it back into the drawer.",
    "Water boils at 100 degrees Celsius at sea level. On a mountain it boils earlier.",
    "def area(width, height):\n    return width * height\n",
    "Why do cats purr? There are several answers, and none of them is complete.",
    "In 1969 two people walked on the moon for the first time.",
    "Il pleut depuis ce matin, et les rues sont vides.",
    "1. Wash the rice.\n2. Add two cups of water.\n3. Cook it slowly.",
    "My brother's new car is red. He likes it; I don't.",
    "Dear Sir or Madam, I am writing to you about the invoice of last week.",
)


async def massive_of(engine: Engine, encode: Callable[[str], Sequence[int]]) -> Massive | None:
    """What is known of the served model; None where it could not be found out.

    Args:
        encode: from text to token ids, with what the tokenizer puts before every text.
    """
    known = _Known(engine.cache_dir)
    found = known.get(engine.facts.fingerprint)
    if found is None:
        try:
            found = await _looked_for(engine, encode)
        except (TrimtabError, NotImplementedError) as error:
            log.warning("massive activations could not be looked for; nothing is told of them", error=str(error))
            return None
        if found is not None:
            known.keep(engine.facts.fingerprint, found)
    return found


async def _looked_for(engine: Engine, encode: Callable[[str], Sequence[int]]) -> Massive | None:
    facts = engine.facts
    layers = facts.sites.get("resid_post", ())
    texts = [list(encode(text))[:min(LENGTH, facts.context_length)] for text in TEXTS]
    texts = [ids for ids in texts if len(ids) > 1 and max(ids) < facts.vocab_size]
    if not layers or not texts:
        return None
    states = []
    for part in _parts(texts, 4 * facts.d_model * len(layers)):
        found = await engine.capture([CaptureRequest(ids, {"resid_post": layers}) for ids in part])
        states += [one["resid_post"] for one in found]
    return find_massive(texts, states)


def _parts(texts: Sequence[list[int]], bytes_of_token: int) -> Iterator[list[list[int]]]:
    part: list[list[int]] = []
    for ids in texts:
        if part and sum(map(len, [*part, ids])) * bytes_of_token > MOST_BYTES:
            yield part
            part = []
        part.append(ids)
    yield part


class _Known:
    """What was found before, in one file of a folder: by fingerprint, and by the code that looks."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / FILE
        self._code = hashlib.sha256(Path(massive.__file__).read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]

    def get(self, fingerprint: str) -> Massive | None:
        try:
            return Massive.from_json(self._read()[self._key(fingerprint)])
        except (KeyError, TypeError, ValueError, AttributeError):
            # There is nothing yet, or it cannot be read; the model can.
            return None

    def keep(self, fingerprint: str, found: Massive) -> None:
        if self._path is None:
            return
        known = {**self._read(), self._key(fingerprint): found.to_json()}
        part = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(dict(list(known.items())[-MOST:])))
            part.replace(self._path)
        except OSError as error:
            log.warning("what was found of massive activations could not be kept; the next start looks again",
                        file=str(self._path), error=str(error))

    def _key(self, fingerprint: str) -> str:
        return f"{fingerprint}-{self._code}"

    def _read(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
