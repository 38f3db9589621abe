"""Requests about keys: who may ask the server, and for what."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal
from urllib.parse import quote

from trimtab_client.flow import Call
from trimtab_client.models import AccessKey, NewAccessKey, OwnKey, Page
from trimtab_client.reading import nothing, reader

KEYS = "/v1/admin/keys"


def own_key() -> Call[OwnKey]:
    """What the key of this client may do."""
    return Call("GET", "/v1/key", reader(OwnKey))


def keys() -> Call[list[AccessKey]]:
    """All keys, oldest first, without their secrets."""
    return Call("GET", KEYS, lambda answer: reader(Page[AccessKey])(answer).data)


def get_key(id: str) -> Call[AccessKey]:
    return Call("GET", f"{KEYS}/{quote(id, safe='')}", reader(AccessKey))


def create_key(name: str, *, roles: Sequence[str], tenant: str = "default", expires_at: datetime | None = None
               ) -> Call[NewAccessKey]:
    """Make a key. Its `key` is shown this once. expires_at: with a time zone."""
    return Call("POST", KEYS, reader(NewAccessKey), json={
        "name": name, "tenant": tenant, "roles": list(roles),
        **({} if expires_at is None else {"expires_at": expires_at.isoformat()})})


def change_key(id: str, *, roles: Sequence[str] | None = None, blocked: bool | None = None,
               expires_at: datetime | Literal["never"] | None = None) -> Call[AccessKey]:
    """Block a key, change its roles or its expiry ("never" takes it away). What is not given stays."""
    given: dict[str, object] = {}
    if roles is not None:
        given["roles"] = list(roles)
    if blocked is not None:
        given["blocked"] = blocked
    if expires_at is not None:
        given["expires_at"] = None if expires_at == "never" else expires_at.isoformat()
    return Call("PATCH", f"{KEYS}/{quote(id, safe='')}", reader(AccessKey), json=given)


def rotate_key(id: str, *, overlap_s: float = 3600.0) -> Call[NewAccessKey]:
    """Give a key another secret; the present one counts for `overlap_s` longer."""
    return Call("POST", f"{KEYS}/{quote(id, safe='')}/rotate", reader(NewAccessKey), json={"overlap_s": overlap_s})


def delete_key(id: str) -> Call[None]:
    return Call("DELETE", f"{KEYS}/{quote(id, safe='')}", nothing)
