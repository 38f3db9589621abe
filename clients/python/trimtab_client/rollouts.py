"""Requests about roll-outs, and about what aliases require of a version."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from trimtab_client.flow import Call
from trimtab_client.models import Page, Requirement, Rollout
from trimtab_client.reading import nothing, reader

ROLLOUTS = "/v1/admin/rollouts"
REQUIREMENTS = "/v1/admin/requirements"


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


def requirements() -> Call[list[Requirement]]:
    """What aliases require of a version before it may be moved there."""
    return Call("GET", REQUIREMENTS, lambda answer: reader(Page[Requirement])(answer).data)


def set_requirement(target: str, bounds: Sequence[Mapping[str, Any]], *, collection: str = "preset", **more: Any
                    ) -> Call[Requirement]:
    """Require a passed evaluation of whatever version an alias, `cheerful@production`, is moved to. more: `prompts`,
    `max_age_s`, `tenant`."""
    return Call("PUT", REQUIREMENTS, reader(Requirement), json={
        "target": target, "collection": collection, "bounds": [dict(bound) for bound in bounds], **more})


def delete_requirement(target: str, *, collection: str = "preset") -> Call[None]:
    return Call("DELETE", REQUIREMENTS, nothing, params={"target": target, "collection": collection})


def _of(id: str) -> str:
    return f"{ROLLOUTS}/{quote(id, safe='')}"
