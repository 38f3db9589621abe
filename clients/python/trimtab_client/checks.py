"""Requests for checks of directions and of specs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trimtab_client.captures import Text, plain_text
from trimtab_client.completions import Steering, steering_field
from trimtab_client.flow import Call, Flow
from trimtab_client.models import Job, PatchCheck, StackCheck
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


def start_spec_check(steering: Steering, *, prompts: Sequence[Text] = (), max_tokens: int | None = None,
                     model: str | None = None) -> Call[Job]:
    """Begin to check what the interventions of a spec, its presets among them, do to each other.

    prompts: texts, token ids or conversations as they come in use; the server has some of its own. max_tokens: of the
    continuations on which effects are measured.
    """
    body: dict[str, Any] = {"steering": {} if steering is None else steering_field(steering),
                            "prompts": [plain_text(text) for text in prompts]}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return Call("POST", "/v1/specs/check", reader(Job), json=body, params={"model": model})


def check_spec(steering: Steering, *, on_progress: Callable[[Job], None] | None = None, **options: Any
               ) -> Flow[StackCheck]:
    """As `start_spec_check`, and wait for it. Raises JobFailed."""
    job = yield start_spec_check(steering, **options)
    done = yield from wait(job.id, on_progress=on_progress)
    return StackCheck.model_validate(done.result)
