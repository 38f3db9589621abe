"""Calls written as JSON objects, read as they come: `{"name": "f", "arguments": {...}}`, one, several, or a list."""

import json
from typing import Literal

from server.text.formats.base import Called, CallReader

ARGUMENTS = ("arguments", "parameters")
SPACE = " \t\r\n"
# Between objects of a list, or of several that follow each other.
BETWEEN = SPACE + "[],;"
Place = Literal["outside", "text", "key", "in key", "colon", "value", "in value", "comma"]


class JsonCallReader(CallReader):
    """
    The name is told as soon as it is known, and the arguments piece by piece, as the model writes them. An object whose
    arguments come before its name is told when the name has come.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._outside_text = ""
        self._place: Place = "outside"
        self._begin()

    def push(self, text: str) -> list[Called]:
        found: list[Called] = []
        for character in text:
            if self._place in ("outside", "text"):
                self._outside(character)
            else:
                self._object += character
                self._inside(character, found)
        return _joined(found)

    def end(self) -> tuple[list[Called], str]:
        unfinished = "" if self._told or self._place in ("outside", "text") else self._object
        # What stands between calls is no text; where there is no call it is.
        outside = self._outside_text.strip(BETWEEN) if self._calls else self._outside_text
        return [], outside + unfinished

    @property
    def within(self) -> bool:
        return self._told and self._place not in ("outside", "text")

    def _begin(self) -> None:
        """An object begins."""
        self._object, self._key, self._value = "", "", ""
        self._name: str | None = None
        # Arguments that came before the name.
        self._early = ""
        self._told = self._argued = False
        self._depth = 0
        self._quoted = self._escaped = False

    def _outside(self, character: str) -> None:
        if character == "{" and self._place == "outside":
            self._begin()
            self._object, self._place = character, "key"
            return
        self._outside_text += character
        if character not in BETWEEN:
            # No object begins here, so this is text, and all that follows is, too.
            self._place = "text"

    def _inside(self, character: str, found: list[Called]) -> None:
        if self._place == "in key":
            self._key += character
            if self._ends_quote(character):
                self._key, self._place = _read(self._key), "colon"
        elif self._place == "in value":
            self._take(character, found)
        elif character in SPACE:
            return
        elif self._place == "key" and character == '"':
            self._key, self._quoted, self._place = character, True, "in key"
        elif self._place == "colon" and character == ":":
            self._place = "value"
        elif self._place == "value" and character not in ",:}]":
            self._value, self._depth, self._place = "", 0, "in value"
            self._take(character, found)
        elif self._place == "comma" and character == ",":
            self._place = "key"
        elif self._place in ("key", "comma") and character == "}" and self._told:
            if not self._argued:
                found.append(Called(arguments="{}"))
            self._place = "outside"
        else:
            # It is no call after all, or broken. What has been told stays told, and the rest is text.
            self._outside_text += character if self._told else self._object
            self._place = "text"

    def _take(self, character: str, found: list[Called]) -> None:
        """The next character of a value."""
        if self._value and self._value[0] not in '{["' and character in f"{SPACE},}}":
            # A number or word ends in front of what ends it.
            self._complete(found)
            self._inside(character, found)
            return
        self._value += character
        if self._key in ARGUMENTS and self._value[0] == "{":
            self._argue(character, found)
        if self._quoted:
            self._ends_quote(character)
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if not self._quoted and self._depth == 0 and self._value[0] in '{["':
            self._complete(found)

    def _ends_quote(self, character: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._quoted = False
        return not self._quoted

    def _complete(self, found: list[Called]) -> None:
        """A value is complete."""
        self._place = "comma"
        if self._key == "name" and self._name is None and self._value.startswith('"'):
            self._name, self._told = _read(self._value), True
            self._calls += 1
            found.append(Called(self._name, self._early))
        elif self._key in ARGUMENTS and not self._value.startswith("{"):
            # Some models write the object as a text that holds JSON.
            self._argue(_read(self._value) if self._value.startswith('"') else self._value, found)

    def _argue(self, piece: str, found: list[Called]) -> None:
        self._argued = True
        if self._told:
            found.append(Called(arguments=piece))
        else:
            self._early = (self._early) + piece


def _read(quoted: str) -> str:
    """A JSON text; as it stands where it is none."""
    try:
        found = json.loads(quoted, strict=False)
    except ValueError:
        return quoted[1:-1]
    return found if isinstance(found, str) else quoted


def _joined(found: list[Called]) -> list[Called]:
    """Neighbouring pieces of arguments as one."""
    joined: list[Called] = []
    for one in found:
        if joined and one.name is None:
            joined[-1] = Called(joined[-1].name, joined[-1].arguments + one.arguments)
        else:
            joined.append(one)
    return joined
