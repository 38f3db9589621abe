"""Readers of answers."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trimtab_client.errors import ConnectionFailed
from trimtab_client.flow import Answer

M = TypeVar("M", bound=BaseModel)


def reader(model: type[M]) -> Callable[[Answer], M]:
    """Reads an answer as `model`."""

    def read(answer: Answer) -> M:
        try:
            return model.model_validate_json(answer.content)
        except ValidationError as error:
            raise ConnectionFailed(f"an answer that is no {model.__name__}: {error.errors()[0]['msg']}") from error

    return read


def plain(answer: Answer) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(answer.content)
    return body


def content_of(answer: Answer) -> bytes:
    return answer.content


def deleted_of(answer: Answer) -> list[str]:
    return [str(ref) for ref in plain(answer)["deleted"]]


def nothing(answer: Answer) -> None:
    """For answers without a body."""
