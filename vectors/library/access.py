"""Keys of API clients, as the library stores them: never a secret, only its SHA-256."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from steering.language.errors import Conflict, NotFound
from vectors.library.audit.notes import note
from vectors.library.database import Database
from vectors.library.revision import Memory
from vectors.library.tables import AccessKey, PolicyRow, now
from vectors.storage_errors import LibraryFull

MOST_KEYS = 10_000


@dataclass(frozen=True)
class StoredKey:
    """digest, former_digest: SHA-256 in hex of the secret, and of the one before, which counts until former_until."""

    id: str
    name: str
    tenant: str
    roles: tuple[str, ...]
    digest: str
    created_at: datetime
    former_digest: str | None = None
    former_until: datetime | None = None
    expires_at: datetime | None = None
    blocked: bool = False
    used_at: datetime | None = None

    @property
    def label(self) -> str:
        return f"{self.tenant}/{self.name}"

    def told(self) -> dict[str, object]:
        """What the audit says of it. No hash of a secret is told, because nobody has to know it to read the audit."""
        return {"id": self.id, "roles": list(self.roles), "expires_at": _time(self.expires_at),
                "blocked": self.blocked, "former_until": _time(self.former_until)}


class AccessKeys:
    """Methods block: call them in a thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._kept: Memory[list[StoredKey]] = Memory(database, 1)

    def all(self) -> list[StoredKey]:
        """In the order in which they were made; from memory where the library has not changed."""
        return list(self._kept.get("all", _all))

    def create(self, *, name: str, tenant: str, roles: Sequence[str], digest: str, expires_at: datetime | None
               ) -> StoredKey:
        """Raises Conflict: the tenant has a key of that name. LibraryFull: there are `MOST_KEYS` already."""

        def work(session: Session) -> StoredKey:
            if (session.scalar(select(func.count()).select_from(AccessKey)) or 0) >= MOST_KEYS:
                raise LibraryFull(f"there are {MOST_KEYS} keys already", fix="Delete keys that nobody uses.")
            if session.scalar(select(AccessKey.id).where(AccessKey.tenant == tenant, AccessKey.name == name)):
                raise Conflict(f"the tenant {tenant!r} has a key named {name!r}", param="name",
                               fix="Choose another name, or rotate that key.")
            row = AccessKey(id=secrets.token_hex(8), name=name, tenant=tenant, roles=list(roles), digest=digest,
                            created_at=now(), expires_at=expires_at, blocked=False)
            session.add(row)
            session.flush()
            made = _stored(row)
            note(session, "key.create", made.label, after=made.told())
            return made

        return self._database.write(work)

    def change(self, key_id: str, *, roles: Sequence[str] | None = None, blocked: bool | None = None,
               keep: str | None = None, **expiry: datetime | None) -> StoredKey:
        """What is not given stays; `expires_at=None` takes the expiry away.

        Raises:
            NotFound.
            Conflict: no key with the role `keep` would be left that is neither blocked nor ever expires.
        """

        def work(session: Session) -> StoredKey:
            row = _row(session, key_id)
            before = _stored(row)
            if roles is not None:
                row.roles = list(roles)
            if blocked is not None:
                row.blocked = blocked
            if "expires_at" in expiry:
                row.expires_at = expiry["expires_at"]
            _check_kept(session, keep)
            changed = _stored(row)
            note(session, "key.change", changed.label, before=before.told(), after=changed.told())
            return changed

        return self._database.write(work)

    def rotate(self, key_id: str, digest: str, overlap: timedelta) -> StoredKey:
        """Give a key another secret; the present one counts for `overlap` longer. Raises NotFound."""

        def work(session: Session) -> StoredKey:
            row = _row(session, key_id)
            before = _stored(row)
            row.former_digest, row.former_until = row.digest, now() + overlap
            row.digest = digest
            changed = _stored(row)
            note(session, "key.rotate", changed.label, before=before.told(), after=changed.told())
            return changed

        return self._database.write(work)

    def delete(self, key_id: str, *, keep: str | None = None) -> None:
        """Raises NotFound, and Conflict as `change` does."""

        def work(session: Session) -> None:
            row = _row(session, key_id)
            gone = _stored(row)
            session.delete(row)
            session.execute(delete(PolicyRow).where(PolicyRow.key_id == key_id))
            _check_kept(session, keep)
            note(session, "key.delete", gone.label, before=gone.told())

        self._database.write(work)

    def used(self, times: Mapping[str, datetime]) -> None:
        """Note when keys were last used. Keys that are gone are passed over."""

        def work(session: Session) -> None:
            for row in session.scalars(select(AccessKey).where(AccessKey.id.in_(list(times)))):
                row.used_at = max(times[row.id], row.used_at or times[row.id])

        # Nobody changes a key by using it.
        self._database.write(work, audited=False)


def _time(when: datetime | None) -> str | None:
    return None if when is None else when.isoformat()


def _check_kept(session: Session, role: str | None) -> None:
    if role is None:
        return
    session.flush()
    if not any(role in key.roles and not key.blocked and key.expires_at is None for key in _all(session)):
        raise Conflict(f"this is the last key with the role {role}, and without one nobody could change keys",
                       param="id", fix=f"Make another key with the role {role} first, one that does not expire.")


def _all(session: Session) -> list[StoredKey]:
    return [_stored(row) for row in session.scalars(select(AccessKey).order_by(AccessKey.created_at, AccessKey.id))]


def _row(session: Session, key_id: str) -> AccessKey:
    row = session.get(AccessKey, key_id, with_for_update=True)
    if row is None:
        raise NotFound(f"there is no key {key_id[:40]!r}", param="id")
    return row


def _stored(row: AccessKey) -> StoredKey:
    return StoredKey(id=row.id, name=row.name, tenant=row.tenant, roles=tuple(row.roles), digest=row.digest,
                     created_at=row.created_at, former_digest=row.former_digest, former_until=row.former_until,
                     expires_at=row.expires_at, blocked=row.blocked, used_at=row.used_at)
