"""Errors of making a model ready."""

from typing import ClassVar

from steering.language.errors import TrimtabError


class ModelUnavailable(TrimtabError):
    """A model could not be fetched or put into the cache."""

    code: ClassVar[str] = "model_unavailable"
