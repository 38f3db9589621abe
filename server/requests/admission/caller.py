"""Who sends a request, and until when it has to be answered."""

from dataclasses import dataclass

from fastapi import Request

from server.identity.principal import CURRENT
from server.requests.admission.deadline import Deadline
from server.requests.admission.fairness import LAST, Client
from server.settings import Settings

# The server itself, when it tries a spec for example.
OWN: Client = ("", "", "server", "")
# What a request of a batch has in its scope, where nothing that comes over a connection can put it: the batch.
BATCH = "trimtab.batch"
# Requests of one session stick to one arm of a roll-out, where they name no user.
SESSION = "x-trimtab-session"
LONGEST_SESSION = 256


@dataclass(frozen=True)
class Caller:
    """client: by tenant, key, host and connection. session: as the request's header names it."""

    client: Client
    deadline: Deadline
    session: str = ""


def caller_of(request: Request, settings: Settings, wanted_s: float | None) -> Caller:
    """wanted_s: seconds that the request may take; None for what the server allows."""
    seconds = min((one for one in (settings.request_timeout_s or None, wanted_s) if one is not None), default=None)
    session = request.headers.get(SESSION, "")[:LONGEST_SESSION]
    who = CURRENT.get()
    if BATCH in request.scope:
        return Caller((LAST, who.tenant, request.scope[BATCH], ""), Deadline(seconds), session)
    key = who.key_id or ""
    host, port = (request.client.host, str(request.client.port)) if request.client is not None else ("", "")
    return Caller((who.tenant, key, host, port), Deadline(seconds), session)
