"""Policies of tenants and keys, as the library stores them. What stands in them is `server.identity.policy.Policy`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from steering.language.errors import NotFound
from steering.language.spec import Spec
from vectors.library.audit.notes import note
from vectors.library.database import Database
from vectors.library.naming import Ref
from vectors.library.revision import Memory
from vectors.library.spaces import READER, Reader, check_shown
from vectors.library.specs import check_refs, from_json, named_in, refs_of
from vectors.library.tables import AccessKey, PolicyRow

# The field of a policy that holds a spec.
MANDATORY = "mandatory"


@dataclass(frozen=True)
class StoredPolicy:
    """key_id: "" for all keys of the tenant. document: JSON text."""

    tenant: str
    key_id: str
    document: str
    updated_at: datetime

    @property
    def label(self) -> str:
        return f"tenant {self.tenant}" if not self.key_id else f"key {self.key_id} of tenant {self.tenant}"


class Policies:
    """Methods block: call them in a thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._kept: Memory[list[StoredPolicy]] = Memory(database, 1)

    def all(self) -> list[StoredPolicy]:
        """From memory where the library has not changed."""
        return list(self._kept.get("all", _all))

    def set(self, tenant: str, key_id: str, policy: Mapping[str, Any], mandatory: Spec | None = None) -> StoredPolicy:
        """
        Args:
            mandatory: the spec in it.

        Raises:
            NotFound: the tenant has no such key, or the spec names an artifact that is not there.
        """

        def work(session: Session) -> StoredPolicy:
            if key_id and session.scalar(select(AccessKey.id).where(AccessKey.id == key_id,
                                                                    AccessKey.tenant == tenant)) is None:
                raise NotFound(f"the tenant {tenant!r} has no key {key_id[:40]!r}", param="key_id")
            if mandatory is not None:
                check_refs(session, mandatory)
                check_shown(named_in(mandatory), Reader(tenant), f"the tenant {tenant}")
            row = session.get(PolicyRow, (tenant, key_id), with_for_update=True)
            before = None if row is None else json.loads(row.document)
            if row is None:
                row = PolicyRow(tenant=tenant, key_id=key_id)
                session.add(row)
            row.document = json.dumps(policy, sort_keys=True, allow_nan=False)
            session.flush()
            stored = _stored(row)
            note(session, "policy.set", stored.label, before=before, after=json.loads(row.document))
            return stored

        return self._database.write(work)

    def delete(self, tenant: str, key_id: str) -> None:
        """Raises NotFound."""

        def work(session: Session) -> None:
            row = session.get(PolicyRow, (tenant, key_id), with_for_update=True)
            if row is None:
                raise NotFound("there is no such policy", param="tenant")
            gone = _stored(row)
            session.delete(row)
            note(session, "policy.delete", gone.label, before=json.loads(gone.document))

        self._database.write(work)


def mandatory_refs(session: Session) -> list[tuple[Ref, str]]:
    """Artifacts that mandatory specs name, with whose policy it is."""
    found = []
    for stored in _all(session):
        document = json.loads(stored.document).get(MANDATORY)
        if document is not None:
            spec = from_json(json.dumps(document), f"the mandatory spec of {stored.label}")
            whose = f"the policy of {stored.label}"
            if not READER.get().sees(stored.tenant):
                whose = "a policy of another tenant"
            found += [(ref, whose) for _, ref in refs_of(spec)]
    return found


def _all(session: Session) -> list[StoredPolicy]:
    return [_stored(row) for row in session.scalars(select(PolicyRow).order_by(PolicyRow.tenant, PolicyRow.key_id))]


def _stored(row: PolicyRow) -> StoredPolicy:
    return StoredPolicy(row.tenant, row.key_id, row.document, row.updated_at)
