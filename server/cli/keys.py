"""`trimtab keys`: who may ask a server, and for what."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.table import Table
from trimtab_client.models import AccessKey, NewAccessKey

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, err, out, print_json
from server.identity.roles import MEANING
from steering.language.errors import InvalidRequest

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Keys of API clients: who may ask the server, and for what.")

Roles = Annotated[list[str] | None, typer.Option("--role", help="May be given several times. " + "; ".join(
    f"{role}: {meaning}" for role, meaning in MEANING.items()) + ".")]
Id = Annotated[str, typer.Argument(metavar="ID", help="As `trimtab keys list` shows it.")]
Days = Annotated[float | None, typer.Option("--days", min=0, help="Days until it expires; never, without this.")]


@app.command("list")
def show_all(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """All keys, without their secrets."""
    with connect(url, key) as client:
        found = client.keys()
    table = Table("id", "tenant", "name", "roles", "state", "last used", box=None)
    for one in found:
        table.add_row(one.id, one.tenant, one.name, " ".join(one.roles), _state(one), _time(one.used_at))
    out.print(table)


@app.command()
def create(name: Annotated[str, typer.Argument(help="Whose it is.")], role: Roles = None,
           tenant: Annotated[str, typer.Option(help="Team or customer that it belongs to.")] = "default",
           days: Days = None, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Make a key and print it. It is shown this once."""
    with connect(url, key) as client:
        made = client.create_key(name, roles=_needed(role), tenant=tenant, expires_at=_in_days(days))
    _print(made)


@app.command()
def change(id: Id, role: Roles = None, days: Days = None,
           never_expires: Annotated[bool, typer.Option("--never-expires", help="Take its expiry away.")] = False,
           url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Give a key other roles, all of which are to be named, or another expiry."""
    if never_expires and days is not None:
        raise InvalidRequest("--days and --never-expires exclude each other", param="--days")
    with connect(url, key) as client:
        print_json(client.change_key(id, roles=role, expires_at="never" if never_expires else _in_days(days))
                   .model_dump(mode="json"))


@app.command()
def block(id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Refuse a key from now on."""
    with connect(url, key) as client:
        client.change_key(id, blocked=True)
    out.print("the key is blocked")


@app.command()
def unblock(id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Take a blocked key again."""
    with connect(url, key) as client:
        client.change_key(id, blocked=False)
    out.print("the key is not blocked any more")


@app.command()
def rotate(id: Id, overlap_s: Annotated[float, typer.Option(min=0, help="Seconds for which the present secret still "
                                                            "counts.")] = 3600.0,
           url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Give a key another secret and print it."""
    with connect(url, key) as client:
        made = client.rotate_key(id, overlap_s=overlap_s)
    _print(made)


@app.command()
def delete(id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Delete a key."""
    with connect(url, key) as client:
        client.delete_key(id)
    out.print("the key is deleted")


@app.command()
def own(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """What the key in use may do."""
    with connect(url, key) as client:
        print_json(client.own_key().model_dump(mode="json"))


def _print(made: NewAccessKey) -> None:
    """The key alone goes to standard output, so that a script can take it."""
    err.print(f"key {made.id} of {made.tenant}/{made.name} with {' '.join(made.roles)}; it is not shown again")
    typer.echo(made.key)


def _needed(roles: list[str] | None) -> list[str]:
    if not roles:
        raise InvalidRequest("a key needs a role", param="--role", fix=f"Give --role, one of {', '.join(MEANING)}.")
    return roles


def _in_days(days: float | None) -> datetime | None:
    return None if days is None else datetime.now(UTC) + timedelta(days=days)


def _state(one: AccessKey) -> str:
    if one.blocked:
        return "blocked"
    if one.expires_at is None:
        return "valid"
    return "expired" if one.expires_at <= datetime.now(UTC) else f"until {_time(one.expires_at)}"


def _time(when: datetime | None) -> str:
    return "never" if when is None else when.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
