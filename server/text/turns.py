"""Where each turn of a rendered conversation ends, markers included: exactly, or not at all.

The contents of a conversation carry a mark at their end when they are rendered, so each is found whatever the template
does to it. What follows a content until its turn ends is taken from a rendering that ends there. Templates that move
text between turns (a system message merged into the first user turn, say) lose or displace a mark, or go on otherwise,
and have no such division. Every conversation is rendered a fixed number of times, so the work grows as its length does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from server.text.literal import END, END_MARK

Message = Mapping[str, Any]
# messages, whether the assistant is to speak next -> text
Render = Callable[[Sequence[Message], bool], str]
# What a template puts before the first turn: a begin-of-text token, a default system prompt.
PREAMBLE = "preamble"
GENERATION = "assistant"
# White space that no template writes, to see whether it trims.
_ODD_SPACE = "\u2003\u2002"
_NEUTRAL = "x"


@dataclass(frozen=True)
class _Closing:
    """What follows the content of a turn up to its end. trims: white space at the end of the content is dropped."""

    text: str
    trims: bool


def marked(messages: Sequence[Message]) -> list[Message]:
    """The messages with a mark behind the last visible character of each; those without one stay as they are."""
    found: list[Message] = []
    for i, message in enumerate(messages):
        core = message["content"].rstrip()
        found.append(message if not core else {
            **message, "content": f"{core}{END}{i}{END}{message['content'][len(core):]}"})
    return found


def turn_ends(messages: Sequence[Message], text: str, render: Render, bos: str | None) -> list[tuple[int, str]] | None:
    """(end, role) of each part of a text in order.

    Args:
        messages: the conversation, before it was marked.
        text: `marked(messages)` as rendered, up to where the assistant speaks; ends are places in it.
        bos: the begin-of-text token.

    Returns None where the template has no such parts.
    """
    places = _places(text, [i for i, message in enumerate(messages) if message["content"].strip()])
    if places is None:
        return None
    try:
        closings: dict[str, _Closing] = {}
        for i, message in enumerate(messages):
            if message["role"] not in closings:
                closing = _closing(messages[:i + 1], render)
                if closing is None:
                    return None
                closings[message["role"]] = closing
        before = _openings(messages, closings, render) if len(places) < len(messages) else {}
        ends = _walk(messages, text, places, closings, before)
        if ends is None:
            return None
        preamble = _preamble(messages[0]["role"], text[ends[0][0]:], render, bos)
    except TemplateError:
        return None
    first = places.get(0, (ends[0][0],))[0]
    if preamble is None or not text.startswith(preamble) or len(preamble) > first:
        return None
    return [(len(preamble), PREAMBLE), *ends, (len(text), GENERATION)]


def _places(text: str, wanted: Sequence[int]) -> dict[int, tuple[int, int]] | None:
    """Number to where its mark is, if each is there once and they are in order."""
    found = [(int(match[1]), match.span()) for match in END_MARK.finditer(text)]
    return dict(found) if [number for number, _ in found] == list(wanted) else None


def _neutral(messages: Sequence[Message]) -> list[Message]:
    return [{"role": message["role"], "content": f"{_NEUTRAL}{END}{i}{END}"} for i, message in enumerate(messages)]


def _closing(messages: Sequence[Message], render: Render) -> _Closing | None:
    """Of the last one of these messages."""
    told = _neutral(messages)
    told[-1] = {**told[-1], "content": f"{told[-1]['content']}{_ODD_SPACE}"}
    text = render(told, False)
    places = _places(text, range(len(told)))
    if places is None:
        return None
    rest = text[places[len(told) - 1][1]:]
    return _Closing(rest.removeprefix(_ODD_SPACE), not rest.startswith(_ODD_SPACE))


def _openings(messages: Sequence[Message], closings: Mapping[str, _Closing], render: Render) -> dict[int, str]:
    """What precedes the content of each message from where the turn before ends."""
    text = render(_neutral(messages), True)
    places = _places(text, range(len(messages)))
    if places is None:
        return {}
    found, at = {}, 0
    for i, message in enumerate(messages):
        start, stop = places[i]
        found[i] = text[at:start - len(_NEUTRAL)]
        at = stop + len(closings[message["role"]].text)
    return found


def _walk(messages: Sequence[Message], text: str, places: Mapping[int, tuple[int, int]],
          closings: Mapping[str, _Closing], before: Mapping[int, str]) -> list[tuple[int, str]] | None:
    ends: list[tuple[int, str]] = []
    at = 0
    for i, message in enumerate(messages):
        content, role = message["content"], message["role"]
        if i in places:
            start, stop = places[i]
            if start < at:
                return None
        else:
            # Nothing of it to mark: it lies where its opening ends.
            if i not in before or not text.startswith(before[i], at):
                return None
            stop = at + len(before[i])
        closing = closings[role]
        tail = closing.text if closing.trims else f"{content[len(content.rstrip()):]}{closing.text}"
        if not text.startswith(tail, stop):
            return None
        at = stop + len(tail)
        ends.append((at, role))
    return ends


def _preamble(role: str, rest: str, render: Render, bos: str | None) -> str | None:
    """What precedes the first turn: the same turn rendered later, behind others, has none. rest: what follows it."""
    opener = {"role": role, "content": f"{_NEUTRAL}{END}0{END}"}
    whole = render([opener], False)
    first = whole[:whole.find(opener["content"])] if opener["content"] in whole else None
    if first is None:
        return None
    other = {"user": "assistant", "assistant": "user"}.get(role)
    if other is None:
        # A system turn cannot be repeated everywhere; with one given, nothing but BOS comes before it. A token with
        # which the next turn begins as well is no BOS but the marker of a turn, also where the tokenizer calls it one.
        if not bos or not first.startswith(bos) or (rest.startswith(bos) and not first.startswith(bos + bos)):
            return ""
        return bos
    contexts: list[list[Message]] = [
        [{"role": "system", "content": "-"}],
        [{"role": role, "content": "-"}, {"role": other, "content": "-"}],
    ]
    for context in contexts:
        try:
            said = render(context, False)
            later = render([*context, opener], False)
        except TemplateError:
            continue
        place = later.find(opener["content"])
        if later.startswith(said) and place >= len(said) and first.endswith(later[len(said):place]):
            return first[:len(first) - (place - len(said))]
    return None
