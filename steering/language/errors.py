"""Typed errors of the whole project: one base class, and one subclass for each cause.

An error is data that callers can act on without reading text. What it becomes over HTTP, its status for example, is
decided by the server alone (`server/errors.py`).
"""

from typing import ClassVar, Self

# The place of a field in the request, one part for each step: ("steering", "interventions", 1, "layers").
Path = tuple[str | int, ...]
MAX_NAME = 80


class TrimtabError(Exception):
    """Base of every error that a user may see.

    Attributes:
        code: stable name of the cause, which clients may switch on.
        message: what is wrong.
        path: the field that is wrong; empty where no field is to blame.
        value: what the field holds, where one value of it is to blame.
        fix: what to do about it.
        retry_after_s: when the same request may succeed, where waiting can help.
    """

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | Path | None = None, value: object = None, fix: str | None = None,
                 retry_after_s: float | None = None) -> None:
        """`param` is the path, or the name of a field that stands at the top of the request."""
        super().__init__(message)
        self.message = message
        self.path = path_of(param)
        self.value = value
        self.fix = fix
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} {self.fix}" if self.fix else self.message

    @property
    def param(self) -> str | None:
        """The path as text, for people and for OpenAI's field of that name. Code reads `path`."""
        return path_text(self.path) or None

    def at(self, *prefix: str | int) -> Self:
        """The same error, whose path is now one from further out: `prefix` stands before it."""
        self.path = (*prefix, *self.path)
        return self

    def about(self, *path: str | int) -> Self:
        """The same error, said of another field: the one that made the caller look at the first."""
        self.path = path
        return self


def path_of(param: str | Path | None) -> Path:
    if param is None:
        return ()
    return (param,) if isinstance(param, str) else param


def path_text(path: Path) -> str:
    """A path as a user writes it: `steering.interventions[1].layers`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{printable(part)}" if text else printable(part)
    return text


def printable(text: str) -> str:
    """A name that a client chose, made short and harmless enough to be shown."""
    return "".join(c if c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF else "?" for c in text[:MAX_NAME])


class InvalidRequest(TrimtabError):
    """The request is at fault. A subclass says how, where that is known."""

    code = "invalid_request"


class InvalidSpec(InvalidRequest):
    """The `steering` field has no meaning, because a field, a value or a combination of them is wrong."""

    code = "invalid_spec"


class NotCalibrated(InvalidSpec):
    """A strength is given as a dose, and the artifact has no calibration for the setting it is used in."""

    code = "not_calibrated"


class InvalidPayload(InvalidRequest):
    """Numbers of an artifact or of `inline` that cannot be used: a wrong shape, NaN, or an index that occurs twice."""

    code = "invalid_payload"


class PayloadTooLarge(InvalidRequest):
    code = "payload_too_large"


class ProgramTooLarge(InvalidRequest):
    """A spec whose numbers are more than the server lets one program have."""

    code = "program_too_large"


class UnsupportedSite(InvalidRequest):
    """The loaded model or the engine does not offer this site or this op at this site."""

    code = "unsupported_site"


class LayerOutOfRange(InvalidRequest):
    code = "layer_out_of_range"


class ArtifactMismatch(InvalidRequest):
    """An artifact made for another model, site or op, and the request does not override that."""

    code = "artifact_mismatch"


class NotFound(InvalidRequest):
    code = "not_found"


class Conflict(InvalidRequest):
    code = "conflict"


class UnsupportedModel(InvalidRequest):
    """An architecture whose sites are not known. Trimtab does not guess where they are."""

    code = "unsupported_model"


class SteeringOverflow(InvalidRequest):
    """An intervention made values that are not finite in the model's dtype; the message says which one, and where."""

    code = "steering_overflow"


class SteeringLimit(InvalidRequest):
    """An intervention moves a token by more of its own norm than the server allows; the message says which one, and
    where."""

    code = "steering_limit"


class ModelOverflow(TrimtabError):
    """The model makes values that are not finite by itself, without any steering."""

    code = "model_overflow"


class SlotsExhausted(TrimtabError):
    """All slots are held by running requests and none came free in time."""

    code = "slots_exhausted"


class ProgramLost(TrimtabError):
    """The engine's worker does not hold the program that a request is to run under. The request ends, because it must
    not run under another program."""

    code = "program_lost"


class EngineUnavailable(TrimtabError):
    code = "engine_unavailable"


class EngineFailed(TrimtabError):
    """The engine failed on this request, and on this request alone. The log has the details."""

    code = "engine_failed"
