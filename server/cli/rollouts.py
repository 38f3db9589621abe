"""`trimtab rollout`: a candidate version beside the stable one, step by step."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from trimtab_client.models import Rollout

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from steering.language.errors import InvalidRequest

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Roll-outs: a candidate version for a part of the "
                                                           "users, with guard rails that end it.")
Id = Annotated[str, typer.Argument(metavar="ID", help="As `trimtab rollout list` shows it.")]


@app.command("list")
def show_all(limit: Annotated[int, typer.Option(help="Lines at most.")] = 20, url: Url = DEFAULT_URL, key: Key = None
             ) -> None:
    """Roll-outs, newest first."""
    with connect(url, key) as client:
        found = client.rollouts(limit=limit)
    table = Table("id", "target", "stable", "candidate", "status", "step", "share", "approved by", box=None)
    for one in found:
        table.add_row(one.id, one.target, str(one.stable), str(one.candidate), one.status,
                      f"{one.step + 1}/{len(one.terms['steps'])}", f"{_share(one):.0%}", one.approved_by or "")
    out.print(table)


@app.command()
def show(id: Id, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with everything.")] = False,
         url: Url = DEFAULT_URL, key: Key = None) -> None:
    """What the guard rails of a roll-out have seen, and what became of it."""
    with connect(url, key) as client:
        _print(client.get_rollout(id), as_json)


@app.command()
def create(
    target: Annotated[str, typer.Argument(help='The alias, "cheerful@production"; a bare name means that alias.')],
    candidate: Annotated[int, typer.Argument(help="Number of the version to be tried.")],
    file: Annotated[Path | None, typer.Option("--terms", help="JSON with steps, rails, keys, alpha, sample and then; "
                                              "see docs/rollouts.md.")] = None,
    share: Annotated[list[float] | None, typer.Option(help="Of the users, one for each step, instead of steps in the "
                                                      "file.")] = None,
    wait_s: Annotated[float, typer.Option(help="Seconds that each of these steps lasts at least.")] = 600.0,
    artifact: Annotated[bool, typer.Option("--artifact", help="The name is that of an artifact, not of a preset.")
                        ] = False,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """Make a draft. It acts on nothing until it is published."""
    terms = {} if file is None else _read(file)
    if share:
        terms["steps"] = [{"share": one, "wait_s": wait_s} for one in share]
    if "steps" not in terms:
        raise InvalidRequest("a roll-out needs steps", param="--share", fix="Give --share, or --terms with steps.")
    with connect(url, key) as client:
        made = client.create_rollout(target, candidate, collection="artifact" if artifact else "preset", **terms)
    out.print(f"{made.id} is a draft: trimtab rollout publish {made.id}")


@app.command()
def publish(id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Approve a draft: it acts on requests from now on."""
    with connect(url, key) as client:
        _print(client.publish_rollout(id))


@app.command()
def promote(id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Point the alias at the candidate, which ends the roll-out."""
    with connect(url, key) as client:
        _print(client.promote_rollout(id))


@app.command("return")
def give_back(id: Id, why: Annotated[str, typer.Option(help="For those who read about it later.")] = "",
              url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Let only the stable version act again, which ends the roll-out."""
    with connect(url, key) as client:
        _print(client.return_rollout(id, why))


@app.command()
def delete(id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Delete a draft, or one that has ended."""
    with connect(url, key) as client:
        client.delete_rollout(id)
    out.print(f"{id} is deleted")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{file} holds no JSON: {error}", param="--terms") from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"{file} holds no JSON object", param="--terms")
    return found


def _share(one: Rollout) -> float:
    if one.status != "published":
        return 1.0 if one.status == "production" else 0.0
    steps = one.terms["steps"]
    return float(steps[min(one.step, len(steps) - 1)]["share"])


def _print(one: Rollout, as_json: bool = False) -> None:
    if as_json:
        print_json(one.model_dump(mode="json"))
        return
    out.print(f"{one.id}: {one.target}, version {one.candidate} beside {one.stable}, {one.status}, step {one.step + 1} "
              f"of {len(one.terms['steps'])}, {_share(one):.0%} of the users")
    if one.rails:
        table = Table("rail", "stable", "samples", "candidate", "samples", "margin", "evidence (1 ends it)", box=None)
        for rail in one.rails:
            stated = rail.rail
            name = stated["metric"] if stated.get("outcome") is None else f"{stated['grader']}: {stated['outcome']}"
            table.add_row(name, _figure(rail.stable_mean), str(rail.stable_samples), _figure(rail.candidate_mean),
                          str(rail.candidate_samples), f"{stated['margin']:g}", f"{rail.evidence:.2f}")
        out.print(table)
    for event in one.history:
        out.print(f"{event['at']} {event['what']} by {event['by']}{': ' if event['why'] else ''}{event['why']}")
    if one.problem is not None:
        out.print(f"it does not go on by itself: {one.problem}")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
