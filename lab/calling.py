"""How well lab-tools calls: held-out tools and values, turn by turn and in whole loops: `python -m lab.calling`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch

from lab.corpus.tool_calls import MOODS, Episode, episodes, test_items
from lab.evaluate import Reader, Score
from lab.paths import TOOLS_MODEL, model_path

REPLY_TOKENS = 64
LOOP_CALLS, LOOP_TOOLS = 5, 2
_CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>", re.DOTALL)


def read_call(reply: str) -> tuple[str, dict[str, Any]] | None:
    """The call in a reply; None where there is none that can be read."""
    found = _CALL.search(reply)
    try:
        call = json.loads(found[1]) if found else None
        return None if call is None else (call["name"], call["arguments"])
    except (ValueError, KeyError, TypeError):
        return None


def calls(reader: Reader, n: int) -> list[Score]:
    """Single turns, told what went before."""
    items = test_items(n)
    found = [read_call(reply) for reply in reader.write([item.prompt for item in items], REPLY_TOKENS)]
    names = [call is not None and call[0] == item.expected[0] for call, item in zip(found, items, strict=True)]
    arguments = [call is not None and call[1] == item.expected[1] for call, item in zip(found, items, strict=True)]
    whole = [a and b for a, b in zip(names, arguments, strict=True)]
    skill = "calls of held-out tools"
    return [Score(skill, "name of the tool", _share(names), n),
            Score(skill, "arguments, held-out values", _share(arguments), n),
            Score(skill, "whole call", _share(whole), n, 0.9)]


def prompt(reader: Reader, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
    """Without the begin token, which the tokenizer adds."""
    text: str = reader.tok.apply_chat_template(list(messages), tools=list(tools) or None, tokenize=False,
                                               add_generation_prompt=True)
    return text.removeprefix(reader.tok.bos_token)


def loops(reader: Reader, n: int) -> list[Score]:
    """Loops of five calls of two tools, in which the model reads its own replies, up to the text that ends them."""
    wanted = episodes(n, LOOP_CALLS, LOOP_TOOLS)
    said: list[list[str]] = [[] for _ in wanted]
    for _ in range(LOOP_CALLS + 1):
        replies = reader.write([prompt(reader, _history(one, own), one.offered())
                                for one, own in zip(wanted, said, strict=True)], REPLY_TOKENS)
        for own, reply in zip(said, replies, strict=True):
            own.append(reply)
    right = [[read_call(reply) == turn.call for reply, turn in zip(own, one.turns, strict=True)]
             for one, own in zip(wanted, said, strict=True)]
    texts = [right_text(own[-1], one) for one, own in zip(wanted, said, strict=True)]
    moods = [all(_mood(reply) == one.mood for reply in own) for one, own in zip(wanted, said, strict=True)]
    skill = "loops of five calls, two tools"
    return [Score(skill, "right calls", _share([ok for one in right for ok in one[:-1]]), n * LOOP_CALLS),
            Score(skill, "loops with all calls right", _share([all(one[:-1]) for one in right]), n, 0.8),
            Score(skill, "last text tells the answer", _share(texts), n),
            Score(skill, "every turn in the mood of the system prompt", _share(moods), n)]


def right_text(reply: str, one: Episode) -> bool:
    """Whether the last reply tells what the last result said, and calls nothing."""
    return read_call(reply) is None and one.turns[-1].said in reply


def _mood(reply: str) -> str | None:
    return next((name for name, mood in MOODS.items() if reply.startswith(mood.openings)), None)


def _history(one: Episode, own: Sequence[str]) -> list[dict[str, Any]]:
    """What was said, with the model's own replies as it wrote them."""
    found: list[dict[str, Any]] = [{"role": "system", "content": one.system}] if one.system else []
    for number, turn in enumerate(one.turns[:len(own) + 1]):
        found.append({"role": turn.speaker, "content": turn.said})
        if number < len(own):
            found.append({"role": "assistant", "content": own[number]})
    return found


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def scores(n: int = 200) -> list[Score]:
    torch.set_grad_enabled(False)
    reader = Reader.of(model_path(TOOLS_MODEL))
    return calls(reader, n) + loops(reader, n // 2)


if __name__ == "__main__":
    for score in scores():
        print(f"{score.skill}: {score.what}: {score.value:.3f} of {score.items}")
