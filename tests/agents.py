"""Loops of tools with lab-tools on known ground truth, and a persona that would break them.

The persona is the mean difference between what the model has at the end of the prompt if it is told to be cheerful and
if it is told nothing.
"""

import asyncio
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from openai import AsyncOpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab import TOOLS_MODEL, model_path
from lab.corpus.tool_calls import MOODS, Episode, episodes

LAYER, STRENGTH = 2, 1.0
CALLS, TOOLS = 5, 2
LEFT_ALONE: dict[str, Any] = {"exclude": {"sections": ["tool_call"]}}
EVERYWHERE = "all"


@cache
def persona() -> list[float]:
    """[width], at the output of layer LAYER."""
    folder = model_path(TOOLS_MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for mood in ("cheerful", "plain"):
        ends = []
        for one in episodes(40, seed=1):
            for turns in range(len(one.turns)):
                messages = [m for m in one.messages(turns) if m["role"] != "system"]
                system = MOODS[mood].system[0]
                told = ([{"role": "system", "content": system}] if system else []) + messages
                text = tokenizer.apply_chat_template(told, tools=one.offered(), tokenize=False,
                                                     add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
                with torch.inference_mode():
                    ends.append(model.model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0, -1])
        found[mood] = torch.stack(ends).mean(0)
    vector: list[float] = (found["cheerful"] - found["plain"]).tolist()
    return vector


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
