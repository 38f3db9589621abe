"""Requests about policies: what a tenant's requests may ask of steering."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from trimtab_client.flow import Call
from trimtab_client.models import Page, TenantPolicy
from trimtab_client.reading import nothing, reader

POLICIES = "/v1/admin/policies"


def policies() -> Call[list[TenantPolicy]]:
    return Call("GET", POLICIES, lambda answer: reader(Page[TenantPolicy])(answer).data)


def set_policy(tenant: str, policy: Mapping[str, Any], *, key_id: str | None = None) -> Call[TenantPolicy]:
    """Set all rules of a policy. key_id: of this key alone."""
    return Call("PUT", f"{POLICIES}/{quote(tenant, safe='')}", reader(TenantPolicy), params={"key_id": key_id},
                json=dict(policy))


def delete_policy(tenant: str, *, key_id: str | None = None) -> Call[None]:
    return Call("DELETE", f"{POLICIES}/{quote(tenant, safe='')}", nothing, params={"key_id": key_id})
