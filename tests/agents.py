"""Loops of tools with lab-tools on known ground truth, and a persona that breaks calls unless its scope spares them.

The persona is the vector under which the model, asked for no mood, opens and closes its turns cheerfully. It is fitted
by gradient on what stands outside of calls.
"""

import asyncio
import json
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from openai import AsyncOpenAI
from transformers import AutoTokenizer

from lab import TOOLS_MODEL, model_path
from lab.corpus.sample import pick
from lab.corpus.tool_calls import MOODS, Episode, episode, episodes, system_text
from lab.models import load_model

LAYER, STRENGTH = 1, 0.8
LESSONS, STEPS, RATE = 16, 20, 0.3
CALLS, TOOLS = 5, 2
KEPT = Path(__file__).parent / "data" / "lab-tools-cheerful.json"
LEFT_ALONE: dict[str, Any] = {"exclude": {"sections": ["tool_call"]}}
EVERYWHERE = "all"


@cache
def persona() -> list[float]:
    """[width], at the output of layer LAYER. `python -m tests.agents` fits it anew."""
    found: list[float] = json.loads(KEPT.read_text())
    return found


def fit() -> list[float]:
    folder = model_path(TOOLS_MODEL)
    model, tokenizer = load_model(folder).requires_grad_(False), AutoTokenizer.from_pretrained(folder)
    draw = random.Random(5)
    lessons = [_lesson(draw, tokenizer) for _ in range(LESSONS)]
    longest = max(len(ids) for ids, _ in lessons)
    ids = torch.tensor([[*ids, *[tokenizer.pad_token_id] * (longest - len(ids))] for ids, _ in lessons])
    touched = torch.tensor([[*own, *[False] * (longest - len(own))] for _, own in lessons])
    vector = torch.zeros(model.config.hidden_size, requires_grad=True)
    hook = model.model.layers[LAYER].register_forward_hook(lambda _, inputs, out: out + touched[..., None] * vector)
    optimizer = torch.optim.Adam([vector], lr=RATE)
    for _ in range(STEPS):
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1][touched[:, :-1]]
        loss = F.cross_entropy(model.lm_head(hidden), ids[:, 1:][touched[:, :-1]])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    hook.remove()
    found: list[float] = vector.detach().tolist()
    return found


def _lesson(draw: random.Random, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A conversation whose last turn is cheerful, unasked, and of which tokens the persona makes it so."""
    one = episode(draw, calls=draw.randint(1, 4), tools=draw.randint(1, TOOLS), mood="plain")
    at, cheer = draw.randrange(len(one.turns)), MOODS["cheerful"]
    # Some of the turns before are cheerful already, as they are in a loop under the persona.
    former = pick(draw, [cheer, MOODS["plain"]])
    text = system_text("", one.tools)
    for turn in one.turns[:at]:
        reply = replace(turn, opening=pick(draw, former.openings)).reply
        text += f"<|{turn.speaker}|>{turn.said}<|end|><|assistant|>{reply}<|end|>"
    turn = replace(one.turns[at], opening=pick(draw, cheer.openings))
    if turn.call is None:
        turn = replace(turn, text=f"{turn.said} {pick(draw, cheer.closings)}")
    prompt: list[int] = tokenizer(f"{text}<|{turn.speaker}|>{turn.said}<|end|><|assistant|>").input_ids
    said: list[int] = tokenizer(f"{turn.reply}<|end|>", add_special_tokens=False).input_ids
    call = tokenizer.convert_tokens_to_ids("<tool_call>")
    free = said.index(call) if call in said else len(said) - 1
    # The last token of the prompt decides the first of the turn.
    touched = [False] * (len(prompt) - 1) + [True] * (1 + free) + [False] * (len(said) - free)
    return prompt + said, touched


def spec(generation: Any, strength: float = STRENGTH) -> dict[str, Any]:
    """Steering of what is generated, from its first token on. generation: which of it."""
    return {"interventions": [{
        "op": "add", "layers": [LAYER], "strength": strength, "inline": {"vector": persona()},
        "scope": {"prompt": {"positions": [-1]}, "generation": generation}}]}


def loops(count: int) -> list[Episode]:
    """Loops of five calls of two tools with held-out names and values, in which nobody asked for a mood."""
    return [one for one in episodes(count * 6, CALLS, TOOLS) if one.mood == "plain" and not one.system][:count]


def hardest() -> Episode:
    return loops(1)[0]


def as_told(one: Episode) -> dict[str, Any]:
    """What an agent's driver needs: tools, the first messages, and what the tools say, in order."""
    return {"tools": one.offered(), "messages": one.messages(0), "results": [turn.said for turn in one.turns[1:]]}


def cheerful(text: str) -> bool:
    return text.startswith(MOODS["cheerful"].openings)


@dataclass
class Loop:
    """What a model did in an episode: its calls, what it said in each turn, and how many tokens were touched."""

    calls: list[tuple[str, Any]]
    said: list[str]
    touched: list[int]

    def right(self, one: Episode) -> bool:
        """Whether every call is the right one and the last text tells the answer."""
        return self.calls == [turn.call for turn in one.turns if turn.call is not None] and (
            one.turns[-1].said in self.said[-1])


async def run_loop(api: AsyncOpenAI, one: Episode, steering: dict[str, Any] | None, model: str = TOOLS_MODEL) -> Loop:
    """An agent as people write it with OpenAI's package: ask, streamed, call what is asked for, go on with what it
    said, until a text comes. It ends with the first call that is wrong."""
    messages, found = one.messages(0), Loop([], [], [])
    for turn in one.turns:
        stream = await api.chat.completions.create(
            model=model, messages=messages, tools=one.offered(), temperature=0, max_tokens=64, stream=True,
            extra_body={} if steering is None else {"steering": steering})
        text, name, arguments, reason, touched = "", "", "", None, 0
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                for call in choice.delta.tool_calls or ():
                    name += (call.function and call.function.name) or ""
                    arguments += (call.function and call.function.arguments) or ""
                reason = choice.finish_reason or reason
            for applied in ((chunk.model_extra or {}).get("steering") or {}).get("applied", ()):
                touched = applied["tokens"]["generation"]
        found.said.append(text)
        found.touched.append(touched)
        if reason != "tool_calls":
            break
        found.calls.append((name, json.loads(arguments)))
        if found.calls[-1] != turn.call:
            break
        call_id = f"call_{len(found.calls)}"
        messages += [{"role": "assistant", "content": text, "tool_calls": [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}]},
            {"role": "tool", "tool_call_id": call_id, "content": one.turns[len(found.calls)].said}]
    return found


async def check_that_the_scope_decides(api: AsyncOpenAI, count: int) -> None:
    """The claim and its two controls, for loops that run side by side."""
    wanted = loops(count)

    async def all_of(steering: dict[str, Any] | None) -> list[Loop]:
        return list(await asyncio.gather(*(run_loop(api, one, steering) for one in wanted)))

    # Without a persona the calls are right, and nobody is cheerful.
    for one, found in zip(wanted, await all_of(None), strict=True):
        assert found.right(one) and not any(map(cheerful, found.said)), found
    # With it every turn is cheerful, and the calls are as right as before, because the scope leaves them alone.
    for one, found in zip(wanted, await all_of(spec(LEFT_ALONE)), strict=True):
        assert found.right(one) and all(map(cheerful, found.said)), found
        assert all(0 < touched < 10 for touched in found.touched[:-1]), found.touched
    # The same vector in the calls too breaks some.
    broken = [not found.right(one) for one, found in zip(wanted, await all_of(spec(EVERYWHERE)), strict=True)]
    assert any(broken)


if __name__ == "__main__":
    KEPT.write_text(json.dumps([round(value, 4) for value in fit()]) + "\n")
