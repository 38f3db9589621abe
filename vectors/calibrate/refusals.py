"""Errors of calibration."""

from steering.language.errors import Conflict, InvalidRequest


class CalibrationFailed(InvalidRequest):
    """No curve could be measured: the artifact has no strength to vary, or none that moves the output."""

    code = "calibration_failed"


class CalibrationCancelled(Conflict):
    code = "calibration_cancelled"
