"""`trimtab presets`: stored specs of a running server."""

from typing import Annotated

import typer
from rich.table import Column, Table

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from server.cli.steer import SpecFile, Steer, steering_of
from steering.language.errors import InvalidSpec

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The presets of the library: specs under a name.")
Ref = Annotated[str, typer.Argument(help='"name", "name@3" or "name@alias".')]
PAGE = 200


@app.command("ls")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Also those of other models.")] = False,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """List the presets of the model that is served, one line per name."""
    with connect(url, key) as client:
        page = client.list_presets(all=everything, limit=PAGE)
        found = list(page.data)
        while page.cursor is not None:
            page = client.list_presets(all=everything, limit=PAGE, cursor=page.cursor)
            found += page.data
    table = Table(Column("ref", overflow="fold"), Column("model name", overflow="fold"), "interventions", "aliases",
                  "description", box=None)
    for one in found:
        acts = ", ".join(str(item.get("artifact") or item.get("op")) for item in one.spec["interventions"])
        table.add_row(one.ref, one.model, acts, " ".join(one.aliases), one.description)
    out.print(table)


@app.command()
def show(ref: Ref, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """One preset with its spec, as JSON."""
    with connect(url, key) as client:
        print_json(client.get_preset(ref).model_dump(mode="json"))


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name; it is also served as the model MODEL:NAME.")],
    steer: Steer = None,
    spec: SpecFile = None,
    description: Annotated[str, typer.Option(help="What it does, for people.")] = "",
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """Store a spec as a new version."""
    wanted = steering_of(steer, None, spec)
    if wanted is None:
        raise InvalidSpec("a preset needs interventions", param="--steer", fix="Give --steer or --spec.")
    with connect(url, key) as client:
        stored = client.create_preset(name, wanted, description)
    out.print(f"stored {stored.ref}, served as {stored.model}")


@app.command()
def delete(
    ref: Ref,
    force: Annotated[bool, typer.Option(help="Also if an alias points at it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """Delete one version, or with a bare name all."""
    if not yes:
        typer.confirm(f"Delete {ref}{'' if '@' in ref else ' with all its versions'}?", abort=True)
    with connect(url, key) as client:
        out.print(f"deleted {', '.join(client.delete_preset(ref, force=force))}")


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="Name of the preset.")],
    alias: Annotated[str, typer.Argument(help="Alias, production say.")],
    version: Annotated[int | None, typer.Argument(help="Version it points at; leave it out to remove the alias.")
                       ] = None,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """Point an alias at a version, or remove it."""
    with connect(url, key) as client:
        if version is None:
            client.remove_preset_alias(name, alias)
            out.print(f"{name}@{alias} is gone")
        else:
            out.print(f"{name}@{alias} is now {client.set_preset_alias(name, alias, version).ref}")
