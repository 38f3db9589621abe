"""`trimtab requirements`: what an alias requires of a version before it may be moved there."""

import json
from pathlib import Path
from typing import Annotated

import typer

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from steering.language.errors import InvalidRequest

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Evaluations that an alias requires of a version before it "
                                                           "may be moved there.")
Target = Annotated[str, typer.Argument(help='The alias, "cheerful@production"; a bare name means that alias.')]
OfArtifact = Annotated[bool, typer.Option("--artifact", help="The name is that of an artifact, not of a preset.")]


@app.command("list")
def show_all(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """All requirements, as JSON."""
    with connect(url, key) as client:
        print_json([one.model_dump(mode="json") for one in client.requirements()])


@app.command("set")
def set_bounds(target: Target,
               file: Annotated[Path, typer.Argument(help="JSON with bounds, prompts, max_age_s and tenant.")],
               artifact: OfArtifact = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Set what an alias requires, all of it."""
    try:
        wanted = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{file} holds no JSON: {error}", param="FILE") from error
    if not isinstance(wanted, dict):
        raise InvalidRequest(f"{file} holds no JSON object", param="FILE")
    with connect(url, key) as client:
        made = client.set_requirement(target, wanted.pop("bounds", []),
                                      collection="artifact" if artifact else "preset", **wanted)
    print_json(made.model_dump(mode="json"))


@app.command()
def delete(target: Target, artifact: OfArtifact = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Let an alias move freely again."""
    with connect(url, key) as client:
        client.delete_requirement(target, collection="artifact" if artifact else "preset")
    out.print(f"{target} requires nothing any more")
