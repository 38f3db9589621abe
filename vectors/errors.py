"""Errors of the library, beside those of `steering.errors`."""

from pydantic import ValidationError

from steering.errors import InvalidPayload, InvalidRequest, TrimtabError


class InvalidMetadata(InvalidPayload):
    """What is recorded about an artifact cannot be used: a wrong field, or one that contradicts the numbers."""

    code = "invalid_metadata"

    @classmethod
    def of(cls, error: ValidationError, prefix: str) -> "InvalidMetadata":
        """The first complaint of pydantic, with its field named."""
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        return cls(first["msg"].removeprefix("Value error, "), param=f"{prefix}.{field}" if field else prefix)


class LibraryFull(InvalidRequest):
    """What is to be stored is over the library's limit on bytes, names or versions."""

    status, code = 409, "library_full"


class CorruptBlob(TrimtabError):
    """Stored numbers are missing or do not match their digest: the storage under the library is damaged."""

    code = "corrupt_blob"


class LibraryUnavailable(TrimtabError):
    """The database cannot be reached, is locked for too long, or was written by a newer version."""

    status, code = 503, "library_unavailable"
