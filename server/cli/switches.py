"""`trimtab default-spec`, `trimtab kill-switch` and `trimtab effects`: what acts on every request, and what it did."""

from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from server.cli.steer import PresetName, SpecFile, Steer, steering_of
from steering.language.errors import InvalidSpec

default_spec = typer.Typer(cls=Commands, no_args_is_help=True, help="The spec that acts on every request which does "
                                                                    "not say otherwise.")
kill_switch = typer.Typer(cls=Commands, no_args_is_help=True, help="Turn all steering of a server off and on.")


@default_spec.command("show")
def show_default(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """The default spec, as JSON; null where there is none."""
    with connect(url, key) as client:
        print_json(client.default_spec().spec)


@default_spec.command("set")
def set_default(steer: Steer = None, preset: PresetName = None, spec: SpecFile = None, url: Url = DEFAULT_URL,
                key: Key = None) -> None:
    """Have a spec act on every request from now on."""
    wanted = steering_of(steer, preset, spec)
    if wanted is None:
        raise InvalidSpec("a default spec needs interventions", param="--steer",
                          fix="Give --steer, --preset or --spec.")
    with connect(url, key) as client:
        print_json(client.set_default_spec(wanted).spec)


@default_spec.command("clear")
def clear_default(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Have none."""
    with connect(url, key) as client:
        client.clear_default_spec()
    out.print("there is no default spec any more")


@kill_switch.command("show")
def show_switch(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Whether steering is off, and why."""
    with connect(url, key) as client:
        print_json(client.kill_switch().model_dump(mode="json"))


@kill_switch.command("on")
def turn_on(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Turn all steering off: answers are those of the untouched model."""
    with connect(url, key) as client:
        client.set_kill_switch(True)
    out.print("the kill switch is on: nothing is steered")


@kill_switch.command("off")
def turn_off(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Let requests be steered again."""
    with connect(url, key) as client:
        client.set_kill_switch(False)
    out.print("the kill switch is off: requests are steered as they ask")


def effects(
    group: Annotated[Literal["artifact", "preset", "minute", "tenant", "arm", "all"],
                     typer.Option(help="One line for each.")] = "artifact",
    rollout: Annotated[str | None, typer.Option(help="Id of a roll-out: only answers of its arms.")] = None,
    arm: Annotated[Literal["stable", "candidate"] | None, typer.Option(
        help="Of that roll-out, only this arm.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only answers to this tenant.")] = None,
    limit: Annotated[int, typer.Option(help="Lines at most.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every figure.")] = False,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """What interventions did to the requests that were measured, largest effect first, and what graded answers were."""
    with connect(url, key) as client:
        found = client.effects(group=group, rollout=rollout, arm=arm, tenant=tenant, limit=limit)
    if as_json:
        print_json(found)
        return
    _print(found["data"], "no effect was measured yet")
    graded = [{**row, "shares": ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())}
              for row in found["outcomes"]]
    out.print()
    _print(graded, "no answer was graded yet")


def _print(rows: list[dict[str, Any]], none: str) -> None:
    if not rows:
        out.print(none)
        return
    names = dict.fromkeys(name for row in rows for name in row)
    plain = [name for name in names if not any(isinstance(row.get(name), (dict, list)) for row in rows)]
    table = Table(*plain, box=None)
    for row in rows:
        cells = [row.get(name, "") for name in plain]
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    out.print(table)
