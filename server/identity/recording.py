"""Who a change is recorded for, and records of what lies outside of the library's database."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import structlog
from starlette.types import Scope

from server.identity.principal import Principal
from server.threads import in_thread
from steering.language.errors import TrimtabError
from vectors.library.audit.log import AuditLog
from vectors.library.audit.notes import ACTOR, Actor

log = structlog.get_logger("trimtab.audit")


def actor(who: Principal, scope: Scope, request_id: str) -> Actor:
    client = scope.get("client")
    return Actor(who.key_id, who.name, who.tenant, str(client[0])[:64] if client else "", request_id)


@asynccontextmanager
async def recorded(audit: AuditLog, action: str, target: str, *, before: Any = None, after: Any = None,
                   needed: bool = True) -> AsyncIterator[None]:
    """A change that no transaction of the library makes. It is recorded before the body of the statement makes it, so
    that none is made unrecorded; where it fails, a second record says so.

    needed: False for what ends work, which must be possible while the library is away. The log then has the record.

    Raises:
        LibraryUnavailable: it cannot be recorded and is not begun.
    """
    try:
        await in_thread(lambda: audit.add(action, target, before=before, after=after))
    except TrimtabError as error:
        if needed:
            raise
        log.error("change_not_recorded", action=action, target=target, who=vars(ACTOR.get()), error=str(error)[:300])
    try:
        yield
    except BaseException as error:
        failure = {"error": error.code if isinstance(error, TrimtabError) else type(error).__name__}
        with anyio.CancelScope(shield=True):
            try:
                await in_thread(lambda: audit.add(f"{action}.failed", target, after=failure))
            except Exception as unrecorded:  # the failure itself is what the client has to hear of
                log.warning("failure_not_recorded", action=action, target=target, error=str(unrecorded)[:300])
        raise
