"""Typed errors of the whole project: one base, one subclass per cause.

Each class carries the HTTP status and the stable `code` that clients may switch on. `param` names the field that is
wrong in the words of the request (`steering.interventions[0].layers`), `fix` says what to do about it, `retry_after_s`
when the same request may succeed (503 and 429 only; it becomes the header Retry-After).
"""

from typing import ClassVar


class TrimtabError(Exception):
    """Base of every error that a user may see."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, fix: str | None = None,
                 retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.fix = fix
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} {self.fix}" if self.fix else self.message

    def at(self, prefix: str) -> "TrimtabError":
        """The same error with `prefix` put before its field, as it is handed outwards."""
        if self.param is None:
            self.param = prefix
        elif self.param.startswith("["):
            self.param = f"{prefix}{self.param}"
        else:
            self.param = f"{prefix}.{self.param}"
        return self


class InvalidRequest(TrimtabError):
    status, code, type = 400, "invalid_request", "invalid_request_error"


class InvalidSpec(InvalidRequest):
    """The `steering` field does not mean anything: a wrong field, value or combination."""

    code = "invalid_spec"


class NotCalibrated(InvalidSpec):
    """A strength is given as a dose, and the artifact has no calibration for the setting it is used in."""

    status, code = 409, "not_calibrated"


class InvalidPayload(InvalidRequest):
    """Numbers of an artifact or of `inline` that cannot be used: wrong shape, NaN, duplicate index."""

    code = "invalid_payload"


class PayloadTooLarge(InvalidRequest):
    status, code = 413, "payload_too_large"


class ProgramTooLarge(InvalidRequest):
    """A spec whose numbers are more than the server lets one program have."""

    status, code = 413, "program_too_large"


class UnsupportedSite(InvalidRequest):
    """The loaded model or the engine does not offer this site or this op at this site."""

    code = "unsupported_site"


class LayerOutOfRange(InvalidRequest):
    code = "layer_out_of_range"


class ArtifactMismatch(InvalidRequest):
    """An artifact made for another model, site or op, and the request does not override that."""

    status, code = 409, "artifact_mismatch"


class NotFound(InvalidRequest):
    status, code = 404, "not_found"


class Conflict(InvalidRequest):
    status, code = 409, "conflict"


class UnsupportedModel(InvalidRequest):
    """An architecture whose sites are not known: nothing is guessed."""

    code = "unsupported_model"


class SteeringOverflow(InvalidRequest):
    """An intervention made values that are not finite in the model's dtype; the message says which, where."""

    code = "steering_overflow"


class SteeringLimit(InvalidRequest):
    """An intervention moves a token by more of its own norm than the server allows; the message says which, where."""

    code = "steering_limit"


class ModelOverflow(TrimtabError):
    """The model itself makes values that are not finite; no steering is needed for that."""

    status, code = 500, "model_overflow"


class SlotsExhausted(TrimtabError):
    """All slots are held by running requests and none came free in time."""

    status, code = 503, "slots_exhausted"


class ProgramLost(TrimtabError):
    """The engine's worker does not hold the program that a request is to run under: it is not run under another."""

    status, code = 503, "program_lost"


class EngineUnavailable(TrimtabError):
    status, code = 503, "engine_unavailable"


class EngineFailed(TrimtabError):
    """The engine failed on this request, and on this request alone. The log has the details."""

    code = "engine_failed"
