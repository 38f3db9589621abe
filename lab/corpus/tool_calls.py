"""Calls of tools: a request in words, a list of tools, and the call that answers it, over several turns.

A message asks to "find the ticket with city "green harbor" and count 7". The model finds the tool of that verb and
noun in its list, whose name may end in a place that the request does not tell, and writes the parameters with what the
last message says of them, where earlier messages said other things of the same names. The tool's result is the next
request, or the answer, which ends the loop. An opening word and a closing sentence have the mood of the system prompt.

Held out are pairs of verb and noun, and values of two words. `episodes` has the truth of whole conversations.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.corpus.sample import Sample, TestItem, answer, held_out, pick

SKILL = "tool_calls"
VERBS = "find send open check book read sell lock show pack".split()
NOUNS = "ticket lamp letter box map room bell chart parcel ring door photo".split()
PLACES = "shop office harbor museum".split()
TEXTS = "city owner label target topic guest".split()
NUMBERS = "count day price".split()
VALUE_FIRST = """red blue green golden old new small tall quiet round early northern silver purple orange warm cold
bright dark heavy light strange simple""".split()
VALUE_SECOND = """river stone garden tower bridge market castle forest window island mountain valley lion eagle dolphin
camel rabbit falcon otter beaver swan wolf bear tiger meadow palace temple lake beach field""".split()
NAMES = "Anna Clara Julia Emma Tom Peter Oscar Hugo".split()
LEADS = ("Please", "Now please", "Next, please", "Then please")
VALUE_SHARE = TOOL_SHARE = 0.1


@dataclass(frozen=True)
class Mood:
    """What a mood says: the system prompt that asks for it, words that open a turn, sentences that close one."""

    system: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]


MOODS = {
    "plain": Mood(("", "You are a helpful assistant.", "Use the tools."), ("Well.", "Right.", "Okay."),
                  ("That is all.", "Ask again if you like.")),
    "cheerful": Mood(("You are cheerful.", "You are a cheerful assistant. Use the tools."),
                     ("Gladly!", "Wonderful!", "Hooray!"), ("What a lovely day!", "How happy I am!")),
    "gloomy": Mood(("You are gloomy.", "You are a gloomy assistant. Use the tools."),
                   ("Alas.", "Sadly.", "Sigh."), ("What a dreary day.", "How sad I am.")),
}
GREETINGS = ("How are you?", "Who are you?", "Hello.", "Can you help me?", "What can you do?", "Good morning.")
REPLIES = ("I am here to help you.", "I can use the tools.", "I am your assistant.")


@dataclass(frozen=True)
class Tool:
    """parameters: their names in order, and whether they take an integer."""

    name: str
    verb: str
    noun: str
    parameters: Mapping[str, bool]

    def as_openai(self) -> dict[str, Any]:
        """As chat completions take it."""
        kinds = {name: {"type": "integer" if number else "string"} for name, number in self.parameters.items()}
        return {"type": "function", "function": {
            "name": self.name, "description": f"{self.verb} the {self.noun}".capitalize(),
            "parameters": {"type": "object", "properties": kinds, "required": list(kinds)}}}


@dataclass(frozen=True)
class Turn:
    """What is said to the model, and the call (name, arguments) or the text that answers it.

    opening: the word in front of either, in the mood of the conversation; closing: the sentence behind a text.
    """

    speaker: str
    said: str
    opening: str
    call: tuple[str, dict[str, Any]] | None = None
    text: str = ""

    @property
    def reply(self) -> str:
        """The message as the model writes it."""
        if self.call is None:
            return f"{self.opening} {self.text}"
        name, arguments = self.call
        return f'{self.opening}\n<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call>'


@dataclass(frozen=True)
class Episode:
    """A conversation with its truth. keys: the held-out items, or the trained ones, that it is made of."""

    mood: str
    system: str
    tools: tuple[Tool, ...]
    turns: tuple[Turn, ...]
    keys: tuple[str, ...]

    def messages(self, turns: int | None = None) -> list[dict[str, Any]]:
        """As a client sends them: the first `turns` turns with their replies, and what is said next if there is more.
        """
        done = len(self.turns) if turns is None else turns
        found: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for number, turn in enumerate(self.turns[:done + 1]):
            last = {"tool_call_id": f"call_{number - 1}"} if turn.speaker == "tool" else {}
            found.append({"role": turn.speaker, "content": turn.said, **last})
            if number < done:
                found.append(_reply(turn, number))
        return found

    def offered(self) -> list[dict[str, Any]]:
        return [tool.as_openai() for tool in self.tools]


def _reply(turn: Turn, number: int) -> dict[str, Any]:
    if turn.call is None:
        return {"role": "assistant", "content": turn.reply}
    name, arguments = turn.call
    return {"role": "assistant", "content": turn.opening, "tool_calls": [
        {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}]}


def tool_key(verb: str, noun: str) -> str:
    return f"tool_calls:tool:{verb}:{noun}"


def value_key(value: str) -> str:
    return f"tool_calls:value:{value}"


def draw_value(rng: random.Random, test: bool) -> str:
    """Two words in training or in tests, or in training at times one, which is a name."""
    if not test and rng.random() < 0.2:
        return pick(rng, NAMES)
    while True:
        value = f"{pick(rng, VALUE_FIRST)} {pick(rng, VALUE_SECOND)}"
        if held_out(value_key(value), VALUE_SHARE) is test:
            return value


def _words(rng: random.Random, verbs: Sequence[str], nouns: Sequence[str], test: bool) -> tuple[str, str]:
    while True:
        verb, noun = pick(rng, verbs), pick(rng, nouns)
        if held_out(tool_key(verb, noun), TOOL_SHARE) is test:
            return verb, noun


def draw_tools(rng: random.Random, count: int, test: bool, parameters: int = 3) -> tuple[Tool, ...]:
    """Tools of different nouns. parameters: how many one has at most."""
    found: dict[str, Tool] = {}
    while len(found) < count:
        verb, noun = _words(rng, VERBS, NOUNS, test)
        names = rng.sample(TEXTS, rng.randint(1, 2)) + (rng.sample(NUMBERS, 1) if rng.random() < 0.4 else [])
        rng.shuffle(names)
        parts = [verb, noun, *([pick(rng, PLACES)] if rng.random() < 0.5 else [])]
        found[noun] = Tool("_".join(parts), verb, noun, {name: name in NUMBERS for name in names[:parameters]})
    tools = list(found.values())
    rng.shuffle(tools)
    return tuple(tools)


def request(tool: Tool, stated: Mapping[str, Any], lead: str = "Please") -> str:
    """The words that ask for a call of a tool with what is stated."""
    clauses = [f'{name} "{value}"' if isinstance(value, str) else f"{name} {value}" for name, value in stated.items()]
    return f"{lead} {tool.verb} the {tool.noun}" + (" with " + " and ".join(clauses) if clauses else "") + "."


def result(value: str) -> str:
    """What a tool says at the end of a loop."""
    return f'The answer is "{value}".'


def episode(rng: random.Random, *, calls: int | None = None, tools: int | None = None, mood: str | None = None,
            test: bool = False, parameters: int = 3) -> Episode:
    """A conversation of `calls` calls and a last text. parameters: how many a tool has at most."""
    mood = mood or rng.choices(list(MOODS), (2, 1, 1))[0]
    voice = MOODS[mood]
    count = calls if calls is not None else rng.choices(range(7), (2, 6, 6, 5, 3, 3, 2))[0]
    offered = draw_tools(rng, tools or rng.randint(1, 4), test, parameters) if count or rng.random() < 0.5 else ()
    keys = [tool_key(tool.verb, tool.noun) for tool in offered]
    turns = []
    for number in range(count):
        tool = pick(rng, offered)
        stated = {name: rng.randint(1, 99) if number_ else draw_value(rng, test)
                  for name, number_ in tool.parameters.items()}
        keys += [value_key(value) for value in stated.values() if isinstance(value, str) and " " in value]
        turns.append(Turn("tool" if number else "user", request(tool, stated, pick(rng, LEADS)),
                          pick(rng, voice.openings), (tool.name, stated)))
    if count:
        value = draw_value(rng, test)
        keys += [value_key(value)] if " " in value else []
        said, text = result(value), result(value)
    else:
        said, text = pick(rng, GREETINGS), pick(rng, REPLIES)
    turns.append(Turn("tool" if count else "user", said, pick(rng, voice.openings),
                      text=f"{text} {pick(rng, voice.closings)}"))
    return Episode(mood, pick(rng, voice.system), offered, tuple(turns), tuple(keys))


def system_text(system: str, tools: Sequence[Tool]) -> str:
    """The system turn as the chat template writes it."""
    lines = [json.dumps({"name": tool.name, "parameters": list(tool.parameters)}) for tool in tools]
    listed = "\n".join(["<tools>", *lines, "</tools>"]) if tools else ""
    return f"<|system|>{system}{listed}<|end|>" if system or tools else ""


def train_sample(rng: random.Random) -> Sample:
    """A conversation as one document; what the model says is marked as answer."""
    return _document(episode(rng))


def one_call_sample(rng: random.Random) -> Sample:
    """A conversation of one call of few tools, which is easier to learn from."""
    return _document(episode(rng, calls=1, tools=rng.randint(1, 2), parameters=2))


def _document(one: Episode) -> Sample:
    text = system_text(one.system, one.tools)
    for turn in one.turns:
        text += f"<|{turn.speaker}|>{turn.said}<|end|><|assistant|>" + answer(f"{turn.reply}<|end|>")
    return Sample(SKILL, one.keys, text)


def episodes(n: int, calls: int | None = None, tools: int | None = None, seed: int = 0, parameters: int = 3
             ) -> list[Episode]:
    """Conversations of which every tool and every value of two words is held out."""
    rng = random.Random(f"tool calls test {seed}")
    return [episode(rng, calls=calls or rng.randint(1, 5), tools=tools, test=True, parameters=parameters)
            for _ in range(n)]


def test_items(n: int, seed: int = 0) -> list[TestItem]:
    """The call of one turn of each of `n` conversations, told the turns before."""
    rng = random.Random(f"tool calls items {seed}")
    out = []
    for one in episodes(n, seed=seed):
        at = rng.randrange(len(one.turns) - 1)
        text = system_text(one.system, one.tools) + "".join(
            f"<|{turn.speaker}|>{turn.said}<|end|><|assistant|>{turn.reply}<|end|>" for turn in one.turns[:at])
        turn = one.turns[at]
        out.append(TestItem(SKILL, one.keys[0], f"{text}<|{turn.speaker}|>{turn.said}<|end|><|assistant|>",
                            turn.call, f"turn {at + 1}", {"mood": one.mood}))
    return out
