"""Requests for checks of directions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trimtab_client.flow import Call, Flow
from trimtab_client.models import Job, PatchCheck
from trimtab_client.reading import reader
from trimtab_client.work import wait


def start_patch_check(pairs: Iterable[Mapping[str, Any]], *, site: str, layer: int, artifact: str | None = None,
                      vector: Sequence[float] | None = None, basis: Sequence[Sequence[float]] | None = None,
                      **options: Any) -> Call[Job]:
    """Begin to check whether a direction through which a patch works is one that the model itself uses.

    pairs: `{"base": ..., "source": ..., "base_answer": ..., "source_answer": ...}`, with `base_position` and
    `source_position` where they are not the last token. artifact, vector, basis: the direction, one of them. options:
    readers, tolerance, draws, seed.
    """
    given = {"artifact": artifact, "vector": None if vector is None else list(vector),
             "basis": None if basis is None else [list(row) for row in basis]}
    body = {"pairs": [dict(pair) for pair in pairs], "site": site, "layer": layer, **options,
            **{name: value for name, value in given.items() if value is not None}}
    return Call("POST", "/v1/checks/patch", reader(Job), json=body)


def check_patch(pairs: Iterable[Mapping[str, Any]], *, site: str, layer: int,
                on_progress: Callable[[Job], None] | None = None, **options: Any) -> Flow[PatchCheck]:
    """As `start_patch_check`, and wait for it. Raises JobFailed."""
    job = yield start_patch_check(pairs, site=site, layer=layer, **options)
    done = yield from wait(job.id, on_progress=on_progress)
    return PatchCheck.model_validate(done.result)
