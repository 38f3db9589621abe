"""SAEs are checked on the served model before they are stored."""

from typing import Any

from server.workbench.subject import EngineSubject
from steering.artifacts.payload import Payload
from steering.models.facts import ModelFacts
from vectors.artifact import Metadata
from vectors.formats.dictionaries.said import SaeFields
from vectors.reconstruction import check_reconstruction


def is_of(metadata: Metadata, facts: ModelFacts) -> bool:
    """Whether an artifact may be one of the served model, by what it says of the one that it was made on."""
    return metadata.fingerprint in (None, facts.fingerprint) and metadata.model_id in (None, facts.model_id)


def checked(metadata: Metadata, payload: Payload, said: SaeFields, subject: EngineSubject) -> Metadata:
    """The metadata with what the check found, and with the model on which it held. SAEs of other models, and other
    kinds, are not checked. Blocks.

    Raises:
        WrongConvention: it does not reconstruct what it is said to be of. TrimtabError: as the engine.
    """
    facts = subject.facts
    if payload.kind != "sae" or not is_of(metadata, facts):
        return metadata
    found = check_reconstruction(payload, metadata.site, subject, said.texts, said.least_explained)
    card: dict[str, Any] = {**(metadata.card or {}), "reconstruction": found}
    return metadata.model_copy(update={"card": card, "fingerprint": facts.fingerprint,
                                       "model_id": metadata.model_id or facts.model_id})
