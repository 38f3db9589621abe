"""What a form of tool calls has to tell."""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steering.programs.sections import Mark


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Called:
    """What became certain of a call: that there is one, by its name, or the next piece of the arguments of the last."""

    name: str | None = None
    arguments: str = ""


class CallReader(ABC):
    """Reads the text of one section of calls as it comes."""

    @abstractmethod
    def push(self, text: str) -> list[Called]: ...

    @abstractmethod
    def end(self) -> tuple[list[Called], str]:
        """What is left when the section ends: calls, and text that did not become a part of one."""

    @property
    @abstractmethod
    def within(self) -> bool:
        """Whether a call has begun that is not complete."""


class ToolFormat(ABC):
    """
    Attributes:
        name: by which settings name it.
        marks: what encloses calls.
    """

    name: str
    marks: tuple[Mark, ...]

    @abstractmethod
    def fits(self, template: str) -> bool:
        """Whether a chat template teaches this form."""

    @abstractmethod
    def reader(self) -> CallReader: ...

    @abstractmethod
    def forced(self, tools: Sequence[Tool], *, many: bool) -> dict[str, Any]:
        """A structural tag, as xgrammar calls it, of one call of one of these tools, or of one and more if `many`."""

    def free(self, held: Sequence[Tool], others: Sequence[str], *, many: bool) -> dict[str, Any] | None:
        """A structural tag of any text in which every call is of one of these tools, with the arguments of those that
        are held to their schema. None where the form cannot say it, because its calls have no mark in front.

        Args:
            others: names of tools whose arguments may be any object.
            many: whether there may be more than one call.
        """
        return None

    def new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"


def tagged(begin: str, schema: Mapping[str, Any] | bool, end: str) -> dict[str, Any]:
    """JSON of a schema between two texts."""
    return {"type": "tag", "begin": begin, "content": json_of(schema), "end": end}


def json_of(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    """With a little white space, as models write arguments, and not with any number of it, which could go on for ever.
    """
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 2}


def listed(tags: Sequence[dict[str, Any]], separator: str, *, many: bool) -> dict[str, Any]:
    """One of the tags, or one and more."""
    if not many:
        return tags[0] if len(tags) == 1 else {"type": "or", "elements": list(tags)}
    return {"type": "tags_with_separator", "tags": list(tags), "separator": separator, "at_least_one": True,
            "stop_after_first": False}


def text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}
