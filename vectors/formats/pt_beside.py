"""What stands beside the content of a `.pt` file: its name, and a JSON file of the same name."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.language.errors import InvalidPayload
from steering.language.vocabulary import Site
from vectors.formats.pt_layers import LAYER_KEYS

MOST_BYTES = 2**20
# task_vector_layer-10, happy.L15, blk_3: a word for layers, set off on both sides, and a number.
_NAMED = re.compile(r"(?:^|[^a-z])(?:layers?|blocks?|blk|l)[-_. ]?([0-9]{1,3})(?![0-9a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Beside:
    """layers: what says a layer, with the layer, most certain first. site: as the JSON tells it."""

    layers: tuple[tuple[str, int], ...] = ()
    site: Site | None = None


def read_beside(path: Path) -> Beside:
    """Raises InvalidPayload: the name says two layers, or the JSON beside the file cannot be read."""
    sidecar, told = _sidecar(path)
    layers = []
    layer = next((told[key] for key in LAYER_KEYS if isinstance(told.get(key), int)), None)
    if layer is not None:
        layers.append((sidecar, layer))
    named = sorted({int(number) for number in _NAMED.findall(path.stem)})
    if len(named) > 1:
        raise InvalidPayload(f"the name {path.name} says more than one layer: {', '.join(map(str, named))}",
                             param="--first-layer", fix="Say which with --first-layer.")
    layers += [("the file's name", number) for number in named]
    # The direction files of refusal_direction: read at the input of the block.
    return Beside(tuple(layers), "resid_pre" if layer is not None and "pos" in told else None)


def _sidecar(path: Path) -> tuple[str, dict[str, Any]]:
    """Name and content of the JSON file that belongs to it."""
    for candidate in (path.with_suffix(".json"), path.with_name(f"{path.stem}_metadata.json"),
                      path.with_name(f"{path.name}.json")):
        if not candidate.is_file():
            continue
        try:
            if candidate.stat().st_size > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES} bytes")
            told = json.loads(candidate.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise InvalidPayload(f"{candidate.name} beside the file cannot be read: {str(error)[:100]}", param="file",
                                 fix="Correct or remove it, and say the layer with --first-layer.") from error
        return candidate.name, told if isinstance(told, dict) else {}
    return "", {}
