"""Requests about the audit: who changed what."""

from datetime import datetime

from trimtab_client.flow import Call
from trimtab_client.models import AuditPage, AuditVerdict
from trimtab_client.reading import reader

AUDIT = "/v1/audit"


def audit(*, after: int | None = None, before: int | None = None, action: str | None = None, target: str | None = None,
          tenant: str | None = None, key_id: str | None = None, request_id: str | None = None,
          since: datetime | None = None, limit: int = 100) -> Call[AuditPage]:
    """Records, the newest first; the oldest first where `after` says behind which number. since: with a time zone."""
    return Call("GET", AUDIT, reader(AuditPage), params={
        "after": after, "before": before, "action": action, "target": target, "tenant": tenant, "key_id": key_id,
        "request_id": request_id, "since": None if since is None else since.isoformat(), "limit": limit})


def verify_audit(number: int | None = None, digest: str | None = None) -> Call[AuditVerdict]:
    """Have the server check the whole chain. number, digest: of a record that has to be there still."""
    return Call("GET", f"{AUDIT}/verify", reader(AuditVerdict), params={"number": number, "digest": digest})
