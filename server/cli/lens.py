"""`trimtab lens`: what each layer of the served model would say next."""

import math
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from trimtab_client import LensReading

from server.cli.artifacts import AsJson
from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import out, print_json
from server.cli.steer import PresetName, SpecFile, Steer, steering_of
from steering.language.errors import InvalidRequest


def lens(
    text: Annotated[str, typer.Argument(help="Text to look into.")],
    chat: Annotated[bool, typer.Option("--chat", help="The text is a user's message, up to where the assistant "
                                       "speaks.")] = False,
    tuned: Annotated[str | None, typer.Option(metavar="ARTIFACT", help="A tuned lens of the library; by default the "
                                              "logit lens.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be repeated.")] = None,
    position: Annotated[list[int] | None, typer.Option(help="Token to look at, negative from the end; may be "
                                                       "repeated. By default the last.")] = None,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens to list.")] = 5,
    group: Annotated[list[str] | None, typer.Option(metavar="NAME=SPELLING,SPELLING", help="Words of which every "
                                                    "spelling counts; may be repeated.")] = None,
    steer: Steer = None,
    preset: PresetName = None,
    spec: SpecFile = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """What each layer of the model would say next, had it to speak from there."""
    with connect(url, key) as client:
        found = client.lens([{"role": "user", "content": text}] if chat else text, lens=tuned or "logit",
                            layers=layer or "all", positions=position or [-1], top_k=top_k,
                            groups=dict(map(_group, group or [])), steering=steering_of(steer, preset, spec))
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(lens_table(found))


def lens_table(found: LensReading) -> Table:
    names = list(found.first_tokens)
    table = Table("layer", "at", "entropy", "likeliest", *names, box=None,
                  title=f"{found.lens} lens, {found.tokens} tokens")
    for layer in found.layers:
        for entry in layer["positions"]:
            said = "  ".join(f"{escape(repr(t['text']))} {math.exp(t['logprob']):.2f}" for t in entry["top"])
            groups = [_shown(entry["groups"][name]) for name in names]
            table.add_row(str(layer["layer"]), f"{entry['position']} {escape(repr(entry['token']))}",
                          f"{entry['entropy']:.2f}", said, *groups)
    return table


def _shown(reading: dict[str, Any]) -> str:
    return f"{math.exp(reading['logprob']):.3f} (rank {reading['rank']})"


def _group(text: str) -> tuple[str, list[str]]:
    name, equals, spellings = text.partition("=")
    if not (name and equals and spellings):
        raise InvalidRequest(f"{text!r} is not of the form NAME=SPELLING,SPELLING", param="--group")
    return name, spellings.split(",")
