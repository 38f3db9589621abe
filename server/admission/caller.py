"""Who asks, and until when."""

import hashlib
from dataclasses import dataclass

from fastapi import Request

from server.admission.deadline import Deadline
from server.admission.fairness import Client

# The server itself, as it tries a spec say.
OWN: Client = ("", "server", "")


@dataclass(frozen=True)
class Caller:
    """client: by key, host and connection."""

    client: Client
    deadline: Deadline


def caller_of(request: Request, most_s: float, wanted_s: float | None) -> Caller:
    """
    Args:
        most_s: seconds a request may take on this server; 0 for any number.
        wanted_s: seconds that this one may take; None for what the server allows.
    """
    # A digest: the key itself has no business in tables.
    key = hashlib.sha256(request.headers.get("authorization", "").encode("latin-1")).hexdigest()[:16]
    host, port = (request.client.host, str(request.client.port)) if request.client is not None else ("", "")
    seconds = min((one for one in (most_s or None, wanted_s) if one is not None), default=None)
    return Caller((key, host, port), Deadline(seconds))
