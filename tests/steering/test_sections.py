"""Sections against a slow reader that looks at the whole text again for every token."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.language.errors import InvalidSpec
from steering.language.scope import Scope
from steering.language.vocabulary import Section
from steering.programs.sections import At, Mark, Marks, SectionRules, Sections
from steering.programs.touch import Touch

THINK = Mark("reasoning", "<think>", "</think>")
CALL = Mark("tool_call", "<tool_call>", "</tool_call>")
FENCE = Mark("json", "```json", "```")
OBJECT = Mark("tool_call", r'\{[ \t\r\n]*"name"', None, opens=True)
LIST = Mark("tool_call", r"\[[A-Za-z_]\w*\(", None, opens=True)
KINDS = {"hermes": Marks((THINK, CALL, FENCE)), "json": Marks((THINK,), "json"),
         "llama": Marks((OBJECT, Mark("tool_call", "<|python_tag|>", None))), "pythonic": Marks((THINK, LIST, FENCE))}
PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<thi", "nk>", "</", "<", "tool_call>", "call", "```",
          "```json", "`", "json", "{", '"name"', '{"na', 'me"', "[", "f(", "[g", "(", " ", "\n", "x", "é", "<|python",
          "_tag|>", "]"]


def section_at(marks: Marks, text: str, start: Section | None = None) -> Section:
    """By the definition: from the beginning, mark by mark, over the whole text."""
    open_mark = next((m for m in marks.marks if m.section == start), None)
    place, blank = 0, True
    while place < len(text):
        rest = text[place:]
        if open_mark is not None:
            if open_mark.end is not None and rest.startswith(open_mark.end):
                place += len(open_mark.end)
                blank = open_mark.section == "reasoning"
                open_mark = None
            else:
                place += 1
            continue
        for mark in marks.marks:
            match = re.match(mark.begin if mark.opens else re.escape(mark.begin), rest)
            if match and (not mark.opens or blank):
                open_mark, place = mark, place + len(match[0])
                break
        else:
            blank = blank and rest[0] in " \t\r\n\f\v"
            place += 1
    return marks.answer if open_mark is None else open_mark.section


def spelled(pieces: Sequence[str]) -> list[str]:
    """One character per byte."""
    return [piece.encode().decode("latin-1") for piece in pieces]


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), pieces=st.lists(st.sampled_from(PIECES), max_size=14),
       thinking=st.booleans())
def test_every_token_has_the_section_that_it_leaves_the_text_in(kind: str, pieces: list[str], thinking: bool) -> None:
    marks = KINDS[kind]
    opened = thinking and THINK in marks.marks
    sections = Sections(marks, At(marks.marks.index(THINK)) if opened else At(), lambda token: spelled(pieces)[token])
    found = sections.of(range(len(pieces)))
    assert found == [section_at(marks, "".join(pieces[:n + 1]), "reasoning" if opened else None)
                     for n in range(len(pieces))]


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), pieces=st.lists(st.sampled_from(PIECES), max_size=14))
def test_no_text_is_lost_and_cutting_changes_nothing(kind: str, pieces: list[str]) -> None:
    marks, text = KINDS[kind], "".join(pieces)
    at, cut = At(), []
    for piece in pieces:
        at, segments = marks.read(at, piece)
        cut += segments
    assert "".join(segment.text for segment in cut) + at.held == text
    end, whole = marks.read(At(), text)
    assert (end.mark, end.held) == (at.mark, at.held)

    def joined(segments: Sequence[object]) -> list[tuple[str, str, str]]:
        found: list[tuple[str, str, str]] = []
        for segment in segments:
            kind_, section, text_ = segment.kind, segment.section, segment.text  # type: ignore[attr-defined]
            if kind_ == "text" and found and found[-1][:2] == ("text", section):
                found[-1] = ("text", section, found[-1][2] + text_)
            else:
                found.append((kind_, section, text_))
        return found

    assert joined(cut) == joined(whole)


WORDS = ["<think>", "hm", "</think>", "Hi", " <tool_call>", "{}", "</tool_call>", "bye"]
SECTIONS = Sections(KINDS["hermes"], spell=lambda token: WORDS[token])
TOLD = ["reasoning", "reasoning", "answer", "answer", "tool_call", "tool_call", "answer", "answer"]


@pytest.mark.parametrize(("generation", "wanted"), [
    ({"sections": ["answer"]}, [s == "answer" for s in TOLD]),
    ({"exclude": {"sections": ["tool_call", "reasoning"]}}, [s == "answer" for s in TOLD]),
    ({"sections": ["reasoning"], "positions": [7]}, [s == "reasoning" or n == 7 for n, s in enumerate(TOLD)]),
    ({"windows": [[1, 6]], "exclude": {"sections": ["tool_call"], "token_ids": [3]}},
     [1 <= n < 6 and s != "tool_call" and n != 3 for n, s in enumerate(TOLD)]),
    ({"sections": ["json"]}, [False] * 8),
])
def test_scopes_pick_and_exclude_sections(generation: object, wanted: list[bool]) -> None:
    scope = Scope.model_validate({"prompt": "none", "generation": generation})
    tokens = list(range(8))
    touch = Touch.of([scope], [5, 5], 8, sections=SECTIONS)
    assert touch.bits_of([5, 5, *tokens]).tolist() == [0, 0, *map(int, wanted)]
    # As an engine does it: token by token, an undone step, as plain numbers in the middle of it, and settled.
    again = Touch.of([scope], [5, 5], 8, sections=SECTIONS)
    bits = []
    for n, token in enumerate(tokens):
        again.of_generated(n, (token + 1) % 8)
        gets, loses = again.of_generated(n, token)
        bits.append((int(again.on[n + 2]) | gets) & ~(int(again.off[n + 2]) | loses))
    assert bits == [int(one) for one in wanted]
    settled = Touch.of([scope], [5, 5], 8, sections=SECTIONS)
    settled.settle(tokens[:4])
    travelled = Touch.from_plain(settled.to_plain(), spell=SECTIONS.spell)
    assert travelled.bits_of([5, 5, *tokens]).tolist() == [0, 0, *map(int, wanted)]
    assert settled.only(0).bits_of([5, 5, *tokens]).tolist() == [0] * 10


def test_sections_that_nobody_tells_are_refused() -> None:
    scope = Scope.model_validate({"generation": {"sections": ["answer"]}})
    with pytest.raises(InvalidSpec) as refused:
        Touch.of([scope], [1], 2)
    assert refused.value.param == "interventions[0].scope.generation.sections"


def test_a_token_whose_past_is_not_known_is_no_guess() -> None:
    rules = SectionRules(SECTIONS, {"answer": 1}, {})
    assert rules.of(0, 3) == (1, 0) and rules.known == 1
    with pytest.raises(ValueError, match="token 2"):
        rules.of(2, 3)
