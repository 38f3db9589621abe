"""`trimtab chat`: the model as it is and as it is steered, side by side."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text
from trimtab_client import AsyncClient, Completion, Receipt

from server.cli.connection import DEFAULT_URL, Key, Url, connect_async
from server.cli.console import out
from server.cli.steer import PresetName, SpecFile, Steer, steering_of

UNSTEERED = {"default": "none"}


@dataclass
class Side:
    """One of the two conversations: each goes on with its own answers."""

    title: str
    steering: dict[str, Any] | None
    messages: list[dict[str, str]] = field(default_factory=list)


def chat(
    prompt: Annotated[str | None, typer.Argument(help="What to say; without it a conversation begins.")] = None,
    steer: Steer = None,
    preset: PresetName = None,
    spec: SpecFile = None,
    text: Annotated[bool, typer.Option("--text", help="Continue the prompt as plain text.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    base: Annotated[bool, typer.Option(help="Show the unsteered answer beside the steered one.")] = True,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 80,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.")] = 0,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Talk to a running server, base and steered side by side."""
    steering = steering_of(steer, preset, spec)
    sides = [Side("steered", steering)] if steering is not None else []
    if base or steering is None:
        sides.insert(0, Side("base", UNSTEERED))
    for side in sides:
        side.messages = [] if system is None else [{"role": "system", "content": system}]
    fields = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    if prompt is not None:
        asyncio.run(_ask(prompt, sides, text, fields, url, key))
        return
    out.print("[dim]An empty line ends the conversation.[/dim]")
    while said := out.input("[bold]> [/bold]").strip():
        asyncio.run(_ask(said, sides, text, fields, url, key))


async def _ask(said: str, sides: list[Side], text: bool, fields: dict[str, Any], url: str, key: str | None) -> None:
    async with connect_async(url, key) as client:
        answers = await asyncio.gather(*(_answer(client, said, side, text, fields) for side in sides))
    out.print(Columns([Panel(Text(answer.text.strip()), title=side.title, expand=True)
                       for side, answer in zip(sides, answers, strict=True)], equal=True, expand=True))
    for side, answer in zip(sides, answers, strict=True):
        side.messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer.text}]
        if side.steering is not UNSTEERED:
            out.print(Text(receipt_line(answer.steering), style="dim"))


async def _answer(client: AsyncClient, said: str, side: Side, text: bool, fields: dict[str, Any]) -> Completion:
    if text:
        return await client.complete(said, steering=side.steering, **fields)
    return await client.chat([*side.messages, {"role": "user", "content": said}], steering=side.steering, **fields)


def receipt_line(receipt: Receipt) -> str:
    """One line per intervention: what, where, how strong, on how many tokens."""
    if receipt.disabled:
        return f"not steered: {receipt.reason}"
    lines = [f"{one.artifact} · {one.op} · {'+'.join(one.sites)} layers {','.join(map(str, one.layers))} · "
             f"{one.strength['value']:g} {one.strength['unit']} · {one.tokens.prompt} prompt and "
             f"{one.tokens.generation} generated tokens" for one in receipt.applied]
    return "\n".join(lines) or "not steered"
