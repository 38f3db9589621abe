"""Requests that make an artifact of another checkpoint fit the served model."""

from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import quote

from trimtab_client.flow import Call, Flow
from trimtab_client.models import Job, Ported
from trimtab_client.reading import reader
from trimtab_client.work import wait


def start_port(ref: str, name: str, source: str, *, method: Literal["auto", "orthogonal", "ridge", "cca"] = "auto",
               depth: int | None = None, model: str | None = None) -> Call[Job]:
    """Begin to port an artifact of another checkpoint to the served model, which stores it as `name`.

    source: id of activations of the artifact's own model, of whole texts at the artifact's site and layers: captured
    there, downloaded, and sent here by `import_activations`. depth: layers of that model, by default as many as this
    one has.
    """
    body: dict[str, Any] = {"name": name, "source": source, "method": method}
    if depth is not None:
        body["depth"] = depth
    return Call("POST", f"/v1/artifacts/{quote(ref, safe='@')}/port", reader(Job), json=body, params={"model": model})


def port(ref: str, name: str, source: str, *, on_progress: Callable[[Job], None] | None = None, **options: Any
         ) -> Flow[Ported]:
    """As `start_port`, and wait for it. Raises JobFailed."""
    job = yield start_port(ref, name, source, **options)
    done = yield from wait(job.id, on_progress=on_progress)
    return Ported.model_validate(done.result)
