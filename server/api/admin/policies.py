"""`/v1/admin/policies`: what requests of a tenant, or of one of its keys, may ask of steering, and how much of all."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from server.api.route import StrictRoute
from server.identity.policy import Policy
from server.requests.rehearsal import rehearse
from server.requests.state import State
from steering.language.errors import InvalidRequest, TrimtabError
from vectors.library.policies import StoredPolicy

router = APIRouter(prefix="/v1/admin/policies", tags=["admin"], route_class=StrictRoute)
Tenant = Annotated[str, Path(max_length=64)]
KeyId = Annotated[str, Query(max_length=24, description="Of this key alone; by default of all keys of the tenant. Both "
                             "hold where both are set.")]


class PolicyView(BaseModel):
    tenant: str
    key_id: str | None = Field(description="Null: it holds for all keys of the tenant.")
    policy: Policy
    updated_at: datetime


class PolicyList(BaseModel):
    data: list[PolicyView]


@router.get("")
def list_policies(state: State) -> PolicyList:
    return PolicyList(data=[_view(stored) for stored in state.library.policies.all()])


@router.put("/{tenant}")
async def set_policy(tenant: Tenant, body: Policy, state: State, key_id: KeyId = "") -> PolicyView:
    """Set all rules of a policy. This server holds requests to them before it answers, others within a second. A
    mandatory spec is run on the engine for a few tokens first; what fails there is not stored."""
    if key_id and body.quota is not None and (body.quota.library_bytes or body.quota.library_names):
        raise InvalidRequest("names belong to a tenant and not to one of its keys", param=("quota", "library_bytes"),
                             fix="Set quotas of the library in the policy of the tenant.")
    if body.mandatory is not None:
        try:
            await rehearse(body.mandatory, state)
        except TrimtabError as error:
            raise (error.at("mandatory") if error.path else error) from None
    document = body.model_dump(mode="json", exclude_unset=True)
    return _view(await state.keys.changed(lambda: state.library.policies.set(tenant, key_id, document,
                                                                             body.mandatory)))


@router.delete("/{tenant}", status_code=204)
async def delete_policy(tenant: Tenant, state: State, key_id: KeyId = "") -> None:
    await state.keys.changed(lambda: state.library.policies.delete(tenant, key_id))


def _view(stored: StoredPolicy) -> PolicyView:
    return PolicyView(tenant=stored.tenant, key_id=stored.key_id or None, updated_at=stored.updated_at,
                      policy=Policy.model_validate_json(stored.document))
