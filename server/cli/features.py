"""`trimtab features`: which features of an SAE are active in a text."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from trimtab_client import FeaturesReading

from server.cli.artifacts import AsJson, Ref
from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import out, print_json
from server.cli.steer import PresetName, SpecFile, Steer, steering_of


def features(
    artifact: Ref,
    text: Annotated[str, typer.Argument(help="Text to look into.")],
    chat: Annotated[bool, typer.Option("--chat", help="The text is a user's message, up to where the assistant "
                                       "speaks.")] = False,
    layer: Annotated[int | None, typer.Option(help="Which layer, of an SAE with several.")] = None,
    position: Annotated[list[int] | None, typer.Option(help="Token to look at, negative from the end; may be "
                                                       "repeated. By default all.")] = None,
    feature: Annotated[list[int] | None, typer.Option(help="Feature whose value is told at every token; may be "
                                                      "repeated.")] = None,
    top_k: Annotated[int, typer.Option(help="Strongest features to list.")] = 5,
    steer: Steer = None,
    preset: PresetName = None,
    spec: SpecFile = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Which features of an SAE are active in a text, token by token."""
    with connect(url, key) as client:
        found = client.features(artifact, [{"role": "user", "content": text}] if chat else text, layer=layer,
                                positions=position, top_k=top_k, features=feature or [],
                                steering=steering_of(steer, preset, spec))
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(features_table(found))


def features_table(found: FeaturesReading) -> Table:
    said = "" if found.explained is None else f", {found.explained:.0%} explained"
    names = [str(one["feature"]) for one in found.positions[0]["features"]]
    table = Table("at", "active", "strongest", *names, box=None,
                  title=f"{found.artifact} at {found.site} of layer {found.layer}{said}")
    for entry in found.positions:
        strongest = "  ".join(f"{one['feature']} {one['value']:.2f}" for one in entry["top"])
        table.add_row(f"{entry['position']} {escape(repr(entry['token']))}", str(entry["active"]), strongest,
                      *(f"{one['value']:.2f}" for one in entry["features"]))
    return table
