"""Sections of what a model writes (its thoughts, its answer, tool calls, JSON), told from marks in the text.

The same reader goes over text, where the server takes a message apart, and over tokens, where an engine needs to know
which of them to steer. A token belongs to the section that it leaves the text in. So the token that completes the mark
in front of a call belongs to the call, whose first token it predicts, and the token that completes the mark behind it
does not. Marks are ASCII; tokens are spelled with one character per byte, so bytes that are no text break nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cache, cached_property
from threading import Lock
from typing import Any, Literal, cast

import regex

from steering.language.vocabulary import Section

SPACE = " \t\r\n\f\v"


@dataclass(frozen=True)
class Mark:
    """
    Attributes:
        section: what it encloses.
        end: None where the section goes on to the end of the text.
        opens: `begin` is a pattern that only the beginning of an answer matches, and what matches it belongs to the
            section. Elsewhere `begin` is text, which stands in front of the section.
    """

    section: Section
    begin: str
    end: str | None
    opens: bool = False


@dataclass(frozen=True)
class At:
    """Where a reader is.

    Attributes:
        mark: which mark is open, None in the answer.
        held: the end of the text, which may yet become a mark.
        blank: the answer has only white space so far.
    """

    mark: int | None = None
    held: str = ""
    blank: bool = True


@dataclass(frozen=True)
class Segment:
    """A piece of text of one section, or a mark at which one begins or ends."""

    kind: Literal["text", "begin", "end"]
    section: Section
    text: str


@dataclass(frozen=True)
class Marks:
    """The marks of a kind of completion. answer: the section of what stands outside of all marks."""

    marks: tuple[Mark, ...] = ()
    answer: Section = "answer"

    def section(self, at: At) -> Section:
        return self.answer if at.mark is None else self.marks[at.mark].section

    def read(self, at: At, text: str) -> tuple[At, list[Segment]]:
        """Where the reader is after `text`, and what has become certain."""
        found: list[Segment] = []
        mark, blank, rest = at.mark, at.blank, at.held + text
        while True:
            if mark is not None:
                open_mark = self.marks[mark]
                ends = () if open_mark.end is None else (open_mark.end,)
                place, end = _first(rest, ends)
                _add(found, open_mark.section, rest[:place])
                rest = rest[place:]
                if end is None:
                    return At(mark, rest, blank), found
                found.append(Segment("end", open_mark.section, end))
                rest, mark, blank = rest[len(end):], None, open_mark.section == "reasoning"
                continue
            if blank:
                white = len(rest) - len(rest.lstrip(SPACE))
                _add(found, self.answer, rest[:white])
                rest = rest[white:]
                opened = self._opened(rest)
                if opened is not None:
                    mark, begun = opened
                    if begun is None:
                        return At(None, rest, True), found
                    # What opened the section is read on as a part of it.
                    found.append(Segment("begin", self.marks[mark].section, ""))
                    _add(found, self.marks[mark].section, begun)
                    rest = rest[len(begun):]
                    continue
            place, begin = _first(rest, self._begins)
            _add(found, self.answer, rest[:place])
            blank = blank and not rest[:place]
            rest = rest[place:]
            if begin is None:
                return At(None, rest, blank), found
            mark = self._begins[begin]
            found.append(Segment("begin", self.marks[mark].section, begin))
            rest = rest[len(begin):]

    def _opened(self, text: str) -> tuple[int, str | None] | None:
        """Which pattern the beginning of an answer matches, and where; None in the place of the match where it may
        match when there is more text."""
        waiting: tuple[int, None] | None = None
        for number, mark in enumerate(self.marks):
            if mark.opens and text:
                match = _pattern(mark.begin).match(text, partial=True)
                if match is not None and not match.partial:
                    return number, match[0]
                if match is not None and match.end() == len(text):
                    waiting = waiting or (number, None)
        return waiting

    @cached_property
    def _begins(self) -> dict[str, int]:
        return {mark.begin: number for number, mark in enumerate(self.marks) if not mark.opens}


def _add(found: list[Segment], section: Section, text: str) -> None:
    if text:
        found.append(Segment("text", section, text))


def _first(text: str, marks: Sequence[str] | Mapping[str, int]) -> tuple[int, str | None]:
    """Where the first of the marks stands in a text, and which; without one, where the longest end of the text begins
    that may become one."""
    places = [(place, mark) for mark in marks if (place := text.find(mark)) >= 0]
    if places:
        return min(places)
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return len(text) - length, None
    return len(text), None


@cache
def _pattern(pattern: str) -> "regex.Pattern[str]":
    return regex.compile(pattern)


@dataclass(frozen=True)
class Sections:
    """How the sections of one completion are told.

    Attributes:
        start: where the reader is after the prompt, which may open a thought.
        spell: the text of a token, one character per byte.
    """

    marks: Marks
    start: At = At()
    spell: Callable[[int], str] = field(default=lambda token: "", compare=False, repr=False)

    @cached_property
    def described(self) -> str:
        """Equal for what tells the same sections of the same tokens."""
        return json.dumps(self.to_plain())

    def of(self, token_ids: Sequence[int]) -> list[Section]:
        """The section of each generated token."""
        return list(map(self.reader(), token_ids))

    def reader(self) -> Callable[[int], Section]:
        """Tells the section of one generated token after the other."""
        at = self.start

        def read(token: int) -> Section:
            nonlocal at
            at, _ = self.marks.read(at, self.spell(token))
            return self.marks.section(at)

        return read

    def to_plain(self) -> dict[str, Any]:
        return {"marks": [list(astuple(mark)) for mark in self.marks.marks], "answer": self.marks.answer,
                "start": list(astuple(self.start))}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], spell: Callable[[int], str]) -> "Sections":
        marks = tuple(Mark(cast(Section, section), begin, end, opens) for section, begin, end, opens in plain["marks"])
        return cls(Marks(marks, plain["answer"]), At(*plain["start"]), spell)


class SectionRules:
    """Bits by section of a generated token, for one completion: `on` adds the token, `off` takes it out.

    The section of a token depends on all before it, so these are remembered. Safe to use from two threads.

    Args:
        first: number of the first generated token that is looked at. What comes before is settled elsewhere.
    """

    def __init__(self, sections: Sections, on: Mapping[Section, int], off: Mapping[Section, int], first: int = 0
                 ) -> None:
        self.sections, self.on, self.off = sections, on, off
        self._first = first
        self._log: list[tuple[int, At]] = []
        self._lock = Lock()

    @property
    def known(self) -> int:
        """How many generated tokens it can go on from."""
        return self._first + len(self._log)

    def only(self, interventions: int) -> "SectionRules":
        on, off = ({section: bits & interventions for section, bits in table.items()} for table in (self.on, self.off))
        return SectionRules(self.sections, on, off, self._first)

    def of(self, index: int, token: int) -> tuple[int, int]:
        """What generated token number `index` gets and loses. All before it must have been asked for."""
        if index < self._first:
            return 0, 0
        with self._lock:
            section = self.sections.marks.section(self._read(index - self._first, token))
        return self.on.get(section, 0), self.off.get(section, 0)

    def _read(self, place: int, token: int) -> At:
        log = self._log
        if place < len(log) and log[place][0] == token:
            return log[place][1]
        if place > len(log):
            raise ValueError(f"generated token {place} is asked for, and {len(log)} are known")
        # Other tokens than last time, after a step that was undone.
        del log[place:]
        before = log[-1][1] if log else self.sections.start
        at, _ = self.sections.marks.read(before, self.sections.spell(token))
        log.append((token, at))
        return at

    def to_plain(self) -> dict[str, Any]:
        with self._lock:
            at = self._log[-1][1] if self._log else self.sections.start
            return {**self.sections.to_plain(), "start": list(astuple(at)), "first": self.known,
                    "on": dict(self.on), "off": dict(self.off)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], spell: Callable[[int], str]) -> "SectionRules":
        return cls(Sections.from_plain(plain, spell), plain["on"], plain["off"], plain["first"])
