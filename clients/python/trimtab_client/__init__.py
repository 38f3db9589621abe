"""Typed client of a Trimtab server: `Client` blocks, `AsyncClient` is awaited; both have the same methods."""

from trimtab_client.client import AsyncClient, Client
from trimtab_client.errors import (
    BadRequest,
    Conflict,
    ConnectionFailed,
    JobFailed,
    NotFound,
    Overloaded,
    ServerFailed,
    ServerRefused,
    TrimtabError,
    Unauthorized,
)
from trimtab_client.models import (
    Activations,
    Artifact,
    Calibrated,
    Completion,
    Delta,
    Extracted,
    FeaturesReading,
    Job,
    LensReading,
    Method,
    Page,
    PatchCheck,
    Ported,
    Preset,
    Receipt,
    StackCheck,
)

__all__ = [
    "Activations", "Artifact", "AsyncClient", "BadRequest", "Calibrated", "Client", "Completion", "Conflict",
    "ConnectionFailed", "Delta", "Extracted", "FeaturesReading", "Job", "JobFailed", "LensReading", "Method",
    "NotFound", "Overloaded", "Page", "PatchCheck", "Ported", "Preset", "Receipt", "ServerFailed", "ServerRefused",
    "StackCheck", "TrimtabError", "Unauthorized",
]
