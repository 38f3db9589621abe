"""`/v1/admin/keys`: who may ask this server, and for what. A key's secret is shown once, when it is made."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Self

from fastapi import APIRouter
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from server.api.route import StrictRoute
from server.identity.keys import Keys, new_secret, spelled
from server.identity.policy import Policy
from server.identity.principal import CURRENT
from server.identity.roles import MEANING, Role
from server.requests.state import State
from steering.language.errors import InvalidRequest, NotFound
from steering.language.fields import PART_PATTERN
from vectors.library.access import StoredKey
from vectors.library.spaces import HOUSE, SHARED, is_tenant

router = APIRouter(tags=["admin"], route_class=StrictRoute)

ROLES_TOLD = "; ".join(f"{role}: {meaning}" for role, meaning in MEANING.items()) + "."
Name = Annotated[str, Field(pattern=PART_PATTERN, description="Lower case letters, digits, dot, underscore and "
                            "hyphen.")]


def _tenant(name: str) -> str:
    if not is_tenant(name):
        raise ValueError(f"no tenant can be named {SHARED}, because names of artifacts that begin so are for all")
    return name


Tenant = Annotated[Name, AfterValidator(_tenant)]
Roles = Annotated[list[Role], Field(min_length=1, max_length=len(MEANING), description=ROLES_TOLD)]
LONGEST_OVERLAP_S = 30 * 86400.0


class KeyBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Name
    tenant: Tenant = HOUSE
    roles: Roles
    expires_at: AwareDatetime | None = Field(default=None, description="From then on it is refused; null: never.")


class KeyChange(BaseModel):
    """What is given changes; what is not given stays. Of `expires_at`, null takes the expiry away."""

    model_config = ConfigDict(extra="forbid")

    roles: Roles | None = None
    blocked: bool | None = Field(default=None, description="true: refused from now on, by every "
                                "server within a second.")
    expires_at: AwareDatetime | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("give roles, blocked or expires_at")
        return self


class RotateBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    overlap_s: float = Field(default=3600.0, ge=0, le=LONGEST_OVERLAP_S, allow_inf_nan=False,
                             description="How long the present secret still counts.")


class KeyView(BaseModel):
    id: str
    name: str
    tenant: str
    roles: list[Role]
    created_at: datetime
    expires_at: datetime | None
    blocked: bool
    used_at: datetime | None = Field(description="When it was last used, to the minute; null: never.")
    former_until: datetime | None = Field(description="Until when the secret before the last rotation counts.")


class NewKey(KeyView):
    key: str = Field(description="The key as clients send it. It is not stored, and shown only now.")


class KeyList(BaseModel):
    object: str = "list"
    data: list[KeyView]


class HeldPolicy(BaseModel):
    of: str = Field(description="The tenant or the key.")
    policy: Policy


class LimitView(BaseModel):
    """A limit on what may be used, and what is used of it by now."""

    of: str = Field(description="The tenant or the key.")
    limit: str = Field(description='"requests a minute" say.')
    most: int
    used: int
    reset_s: float = Field(description="Seconds until it begins anew.")


class OwnKey(BaseModel):
    """Who the request's key belongs to, and what holds for it."""

    name: str
    tenant: str
    roles: list[Role]
    policies: list[HeldPolicy] = Field(description="All of which hold.")
    limits: list[LimitView]


@router.get("/v1/key")
async def show_own_key(state: State) -> OwnKey:
    """What the key of this request may do, and how much of it is left."""
    who = CURRENT.get()
    used = await state.quotas.usage(who)
    return OwnKey(name=who.name, tenant=who.tenant, roles=sorted(who.roles),
                  policies=[HeldPolicy(of=one.of, policy=one.policy) for one in who.policies],
                  limits=[LimitView(of=one.window.held.of, limit=one.window.told, most=one.window.most, used=one.used,
                                    reset_s=one.reset_s) for one in used])


@router.post("/v1/admin/keys", status_code=201)
async def create_key(body: KeyBody, state: State) -> NewKey:
    """Make a key. Once a server has keys, every request needs one."""
    if not state.keys.asked_for and "admin" not in body.roles:
        raise InvalidRequest("the first key of a server without TRIMTAB_API_KEY must have the role admin, or nobody "
                             "could change keys any more", param="roles", fix="Make an administrator's key first.")
    if body.expires_at is not None and body.expires_at <= datetime.now(UTC):
        raise InvalidRequest("the key would have expired already", param="expires_at", fix="Give a later time.")
    secret, digest = new_secret()
    made = await state.keys.changed(lambda: state.library.keys.create(
        name=body.name, tenant=body.tenant, roles=sorted(set(body.roles)), digest=digest, expires_at=body.expires_at))
    return NewKey(**_view(made, state.keys), key=spelled(made.id, secret))


@router.get("/v1/admin/keys")
async def list_keys(state: State) -> KeyList:
    """All keys, oldest first, without their secrets."""
    await state.keys.refresh()
    return KeyList(data=[KeyView(**_view(key, state.keys)) for key in state.keys.all()])


@router.get("/v1/admin/keys/{id}")
async def show_key(id: str, state: State) -> KeyView:
    await state.keys.refresh()
    found = next((key for key in state.keys.all() if key.id == id), None)
    if found is None:
        raise NotFound(f"there is no key {id[:40]!r}", param="id")
    return KeyView(**_view(found, state.keys))


@router.patch("/v1/admin/keys/{id}")
async def change_key(id: str, body: KeyChange, state: State) -> KeyView:
    """Block a key, change its roles or its expiry. Requests that run already go on."""
    expiry = {"expires_at": body.expires_at} if "expires_at" in body.model_fields_set else {}
    roles = None if body.roles is None else sorted(set(body.roles))
    changed = await state.keys.changed(lambda: state.library.keys.change(
        id, roles=roles, blocked=body.blocked, keep=state.keys.keep, **expiry))
    return KeyView(**_view(changed, state.keys))


@router.post("/v1/admin/keys/{id}/rotate")
async def rotate_key(id: str, body: RotateBody, state: State) -> NewKey:
    """Give a key another secret. The present one counts for `overlap_s` longer, so that clients can be changed."""
    secret, digest = new_secret()
    overlap = timedelta(seconds=body.overlap_s)
    changed = await state.keys.changed(lambda: state.library.keys.rotate(id, digest, overlap))
    return NewKey(**_view(changed, state.keys), key=spelled(changed.id, secret))


@router.delete("/v1/admin/keys/{id}", status_code=204)
async def delete_key(id: str, state: State) -> None:
    await state.keys.changed(lambda: state.library.keys.delete(id, keep=state.keys.keep))


def _view(key: StoredKey, keys: Keys) -> dict[str, Any]:
    return {"id": key.id, "name": key.name, "tenant": key.tenant, "roles": list(key.roles),
            "created_at": key.created_at, "expires_at": key.expires_at, "blocked": key.blocked,
            "used_at": keys.used_at(key), "former_until": key.former_until}
