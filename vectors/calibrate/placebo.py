"""Random artifacts that a calibration or an evaluation measures beside the one at hand."""

from steering.artifacts.payload import Payload
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from vectors.calibrate.refusals import CalibrationFailed
from vectors.placebo import DRAWS, drawn_like


def random_like(payload: Payload, facts: ModelFacts, site: Site, seed: int) -> Payload:
    """See `drawn_like`.

    Raises:
        CalibrationFailed: a kind that has no random counterpart.
    """
    if payload.kind not in DRAWS:
        raise CalibrationFailed(f"there is no placebo for artifacts of kind {payload.kind}", param="name",
                                fix=f"Kinds that can be calibrated: {', '.join(DRAWS)}.")
    return drawn_like(payload, facts, site, seed)
