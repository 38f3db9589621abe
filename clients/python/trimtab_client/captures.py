"""Requests for captured activations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

from trimtab_client.completions import Steering, models, steering_field
from trimtab_client.flow import Call, Flow, Stream
from trimtab_client.models import Activations, Job, Page
from trimtab_client.reading import content_of, nothing, reader
from trimtab_client.work import wait

Text = str | Sequence[int] | Sequence[Mapping[str, Any]]


def start_capture(input: Sequence[Text], sites: Mapping[str, Any], *, positions: Sequence[int] | None = None,
                  pool: Literal["none", "mean"] = "none", dtype: Literal["float32", "float16", "bfloat16"] = "float32",
                  expires_after_s: float | None = None, steering: Steering = None, model: str | None = None
                  ) -> Flow[Job]:
    """Begin to capture what the model holds inside while it reads texts.

    input: texts, token ids or conversations. sites: layers by site, `{"resid_post": [3, 5]}`. positions: tokens of each
    text, negative ones from the end, None for all. pool: "mean" for one row a text.
    """
    if model is None:
        model = (yield models())[0]
    body: dict[str, Any] = {
        "model": model, "input": [plain_text(text) for text in input], "sites": dict(sites), "pool": pool,
        "dtype": dtype, "positions": None if positions is None else list(positions)}
    if expires_after_s is not None:
        body["expires_after_s"] = expires_after_s
    if steering is not None:
        body["steering"] = steering_field(steering)
    job: Job = yield Call("POST", "/v1/activations", reader(Job), json=body)
    return job


def capture(input: Sequence[Text], sites: Mapping[str, Any], *, on_progress: Callable[[Job], None] | None = None,
            **options: Any) -> Flow[Activations]:
    """As `start_capture`, and wait for it. Raises JobFailed."""
    job = yield from start_capture(input, sites, **options)
    done = yield from wait(job.id, on_progress=on_progress)
    return Activations.model_validate(done.result)


def import_activations(data: bytes) -> Call[Activations]:
    """Keep a file that another server captured; see `port`."""
    return Call("POST", "/v1/activations/import", reader(Activations), content=data,
                headers={"Content-Type": "application/octet-stream"})


def list_activations() -> Call[Page[Activations]]:
    """Newest first."""
    return Call("GET", "/v1/activations", reader(Page[Activations]))


def get_activations(id: str) -> Call[Activations]:
    return Call("GET", f"/v1/activations/{quote(id, safe='')}", reader(Activations))


def download_activations(id: str) -> Call[bytes]:
    """The safetensors file: tensors `SITE.LAYER` `[rows, width]`, and int32 `text`, `position`, `token` `[rows]`."""
    return Call("GET", f"/v1/activations/{quote(id, safe='')}/content", content_of)


def stream_activations(id: str) -> Flow[Stream[bytes]]:
    """The same file in pieces, for one that does not fit into memory."""
    yield from ()
    return Stream("GET", f"/v1/activations/{quote(id, safe='')}/content", bytes, raw=True)


def delete_activations(id: str) -> Call[None]:
    return Call("DELETE", f"/v1/activations/{quote(id, safe='')}", nothing)


def plain_text(text: Text) -> Any:
    return text if isinstance(text, str) else [dict(part) if isinstance(part, Mapping) else part for part in text]
