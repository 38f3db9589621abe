"""`trimtab chat`: the model as it is and as it is steered, side by side."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text
from trimtab_client import AsyncClient, Completion, Receipt

from server.cli.connection import DEFAULT_URL, Key, Url, connect_async
from server.cli.console import out
from server.cli.given import layers_of
from server.cli.steer import Alpha, Beta, PresetName, SpecFile, Steer, Weak, contrasted, steering_of
from steering.language.errors import InvalidRequest, TrimtabError

UNSTEERED = {"default": "none"}
HELP = """\
/steer NAME[=STRENGTH] ...  steer with these artifacts from here on; /steer off ends it
/new                        begin again, with the same steering
/exit                       end the conversation, as an empty line does
"""


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
    layers: Annotated[str | None, typer.Option(help="Layers that --steer acts on, 3, 3,4 or 3-6, in place of the "
                                               "artifact's own.")] = None,
    weak: Weak = None,
    alpha: Alpha = 0.1,
    beta: Beta = 0.5,
    base: Annotated[bool, typer.Option(help="Show the unsteered answer beside the steered one.")] = True,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 80,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.")] = 0,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Talk to a running server, base and steered side by side."""
    steering = contrasted(at_layers(steering_of(steer, preset, spec), layers), weak, alpha, beta)
    opening = [] if system is None else [{"role": "system", "content": system}]
    sides = _sides(steering, base, opening)
    fields = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    if prompt is not None:
        asyncio.run(_ask(prompt, sides, text, fields, url, key))
        return
    out.print("[dim]/help says what there is; /exit or an empty line ends the conversation.[/dim]")
    while said := _line():
        if not said.startswith("/"):
            asyncio.run(_ask(said, sides, text, fields, url, key))
            continue
        command, *words = said.split()
        if command in ("/exit", "/quit"):
            return
        try:
            sides = _commanded(command, words, sides, base, opening)
        except TrimtabError as error:
            out.print(escape(str(error)))


def _line() -> str:
    """What is said next; nothing at the end of the input."""
    try:
        return out.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""


def _sides(steering: dict[str, Any] | None, base: bool, opening: list[dict[str, str]]) -> list[Side]:
    sides = [Side("steered", steering, [*opening])] if steering is not None else []
    return [Side("base", UNSTEERED, [*opening]), *sides] if base or steering is None else sides


def _commanded(command: str, words: list[str], sides: list[Side], base: bool, opening: list[dict[str, str]]
               ) -> list[Side]:
    """The conversations after a command.

    Raises:
        InvalidRequest: there is no such command, or it takes other words.
    """
    if command == "/help":
        out.print(HELP, markup=False)
        return sides
    if command == "/new":
        return _sides(next((side.steering for side in sides if side.steering is not UNSTEERED), None), base, opening)
    if command == "/steer":
        if not words:
            raise InvalidRequest("/steer needs an artifact", param="/steer",
                                 fix="Write /steer cheerful=1.5, or /steer off.")
        steering = None if words == ["off"] else steering_of(words)
        out.print("[dim]not steered from here on[/dim]" if steering is None else
                  f"[dim]steered from here on: {escape(' '.join(words))}[/dim]")
        # Each side goes on with its own answers.
        before = next((side for side in sides if side.steering is not UNSTEERED), sides[0])
        plain = next((side for side in sides if side.steering is UNSTEERED), before)
        kept = _sides(steering, base, opening)
        for side in kept:
            side.messages = [*(plain if side.steering is UNSTEERED else before).messages]
        return kept
    raise InvalidRequest(f"there is no command {command}", param=command, fix="/help says what there is.")


def at_layers(steering: dict[str, Any] | None, layers: str | None) -> dict[str, Any] | None:
    """The spec with its interventions at these layers.

    Raises:
        InvalidRequest: there is no intervention that could act there.
    """
    wanted = layers_of(layers)
    if wanted is None:
        return steering
    if steering is None or not steering.get("interventions"):
        raise InvalidRequest("nothing acts at these layers", param="--layers", fix="Give --steer, too.")
    return {**steering, "interventions": [{**one, "layers": wanted} for one in steering["interventions"]]}


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
    if receipt.contrast is not None:
        weak = " + ".join(one["artifact"] for one in receipt.contrast["weak"]) or "the untouched model"
        lines.append(f"against {weak}: alpha {receipt.contrast['alpha']:g}, beta {receipt.contrast['beta']:g}")
    return "\n".join(lines) or "not steered"
