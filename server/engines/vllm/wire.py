"""How programs and scopes travel to the workers: programs as safetensors bytes, scopes as plain lists.

A request carries only numbers that msgpack knows; tensors in `SamplingParams.extra_args` would lose their type.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors.torch import load, save

from steering.language.vocabulary import Site
from steering.ops.base import Row
from steering.programs.program import Program
from steering.programs.touch import Touch

# The key of everything of ours in `SamplingParams.extra_args` and in vLLM's `additional_config`.
EXTRA = "trimtab"
# How the tags of measuring passes begin, as other requests have none of theirs.
PASS = "pass-"
# The attribute of a model runner's output that names requests to be ended.
FAULTS = "trimtab_faults"
# The priority of what a job asks for. Requests have 0 and measurements 1; what is lower goes first.
GUEST = 2
Key = tuple[Site, int]


@dataclass(frozen=True)
class Fault:
    """Why a request is ended.

    kind: "step": an intervention's step was not carried out. "behind": its values, or the model's own, stopped being
    finite. "program": its slot holds another program than it asked for.
    position: of the token in prompt and completion. The rest is told of steps alone.
    """

    kind: Literal["step", "behind", "program"]
    position: int
    intervention: int = 0
    site: str | None = None
    layer: int | None = None
    step: float = math.inf


@dataclass(frozen=True)
class Rows:
    """The rows of a program as a worker holds them: one mapping per intervention. Equal numbers in `scopes`: equal
    scopes, so that such interventions always touch the same tokens. limited: the limit on steps holds for it."""

    digest: str
    rows: tuple[Mapping[Key, Row], ...]
    scopes: tuple[int, ...]
    limited: bool = True


def name_of(program: Program) -> str:
    """The name under which workers know a program, and their cache the blocks that it touched."""
    return program.identity


def encode_program(program: Program) -> bytes:
    """Rows of every intervention, in order."""
    places: list[tuple[int, str, int, str]] = []
    tensors: dict[str, torch.Tensor] = {}
    for j, item in enumerate(program.compiled):
        for (site, layer), row in item.rows.items():
            for name, tensor in row.tensors.items():
                tensors[f"{len(places)}.{name}"] = tensor.detach().to("cpu", torch.float32).clone().contiguous()
            places.append((j, site, layer, row.kernel))
    scopes = [item.scope.model_dump_json() for item in program.compiled]
    known = list(dict.fromkeys(scopes))
    head = {"digest": name_of(program), "places": places, "scopes": [known.index(s) for s in scopes],
            "limited": program.limited}
    return save(tensors, metadata={EXTRA: json.dumps(head)})


def decode_program(content: bytes) -> Rows:
    length = int.from_bytes(content[:8], "little")
    head = json.loads(json.loads(content[8:8 + length])["__metadata__"][EXTRA])
    tensors = load(content)
    per_place: list[dict[str, torch.Tensor]] = [{} for _ in head["places"]]
    for name, tensor in tensors.items():
        place, _, field = name.partition(".")
        per_place[int(place)][field] = tensor
    rows: list[dict[Key, Row]] = [{} for _ in head["scopes"]]
    for (j, site, layer, kernel), held in zip(head["places"], per_place, strict=True):
        rows[j][site, layer] = Row(kernel, held)
    return Rows(head["digest"], tuple(rows), tuple(head["scopes"]), head["limited"])


def extra_of(program: Program | None, touch: Touch | None, slot: int) -> dict[str, Any]:
    """What a request carries of its program, which is in `slot`."""
    if program is None or touch is None:
        return {}
    return {"slot": slot, "digest": name_of(program), "touch": touch.to_plain()}


def carried_by(sampling: Any) -> dict[str, Any]:
    """What a request brought along in its SamplingParams, empty for one that is none of our business."""
    carried: dict[str, Any] = (getattr(sampling, "extra_args", None) or {}).get(EXTRA) or {}
    return carried


def touch_of(extra: Mapping[str, Any], spell: Callable[[int], str] = lambda token: "") -> Touch:
    """Which tokens a request says its program acts on. spell: the text of a token, where sections are to be told.

    The map has one position more than the completion, because an engine that schedules ahead may run a token past the
    end.
    """
    return Touch.from_plain(extra["touch"], spare=1, spell=spell)
