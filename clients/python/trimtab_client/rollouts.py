"""Requests about roll-outs: a candidate version beside the stable one, with guard rails that end it."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from trimtab_client.flow import Call
from trimtab_client.models import Page, Rollout
from trimtab_client.reading import nothing, reader

ROLLOUTS = "/v1/admin/rollouts"


def rollouts(*, limit: int = 50) -> Call[list[Rollout]]:
    return Call("GET", ROLLOUTS, lambda answer: reader(Page[Rollout])(answer).data, params={"limit": limit})


def get_rollout(id: str) -> Call[Rollout]:
    return Call("GET", _of(id), reader(Rollout))


def create_rollout(target: str, candidate: int, *, steps: Sequence[Mapping[str, Any]], collection: str = "preset",
                   **terms: Any) -> Call[Rollout]:
    """Make a draft, which acts on nothing until it is published. target: the alias, `cheerful@production`. terms:
    `rails`, `keys`, `alpha`, `sample`, `then`."""
    return Call("POST", ROLLOUTS, reader(Rollout), json={
        "target": target, "candidate": candidate, "collection": collection, "steps": [dict(step) for step in steps],
        **terms})


def publish_rollout(id: str) -> Call[Rollout]:
    """Approve a draft: it acts on requests from now on."""
    return Call("POST", f"{_of(id)}/publish", reader(Rollout))


def promote_rollout(id: str) -> Call[Rollout]:
    """Point the alias at the candidate, which ends the roll-out."""
    return Call("POST", f"{_of(id)}/promote", reader(Rollout))


def return_rollout(id: str, why: str = "") -> Call[Rollout]:
    """Let only the stable version act again, which ends the roll-out."""
    return Call("POST", f"{_of(id)}/return", reader(Rollout), json={"why": why})


def delete_rollout(id: str) -> Call[None]:
    return Call("DELETE", _of(id), nothing)


def _of(id: str) -> str:
    return f"{ROLLOUTS}/{quote(id, safe='')}"
