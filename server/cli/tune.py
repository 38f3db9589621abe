"""`trimtab tune`: try a stored vector again, on other prompts or by another grader, and store what was found."""

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.artifacts import stored_as
from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import out
from server.cli.extract import finish
from server.cli.given import json_or_text
from server.cli.given import prompts as prompts_of
from server.cli.records import read_records
from steering.language.errors import InvalidRequest


def tune(
    ref: Annotated[str, typer.Argument(help='Artifact: "name", "name@3" or "name@alias".')],
    prompts: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Questions to try it on: plain "
                                                 "lines, or JSON lines with text or messages.")] = None,
    grader: Annotated[str | None, typer.Option(metavar="JSON", help='What a success is, \'{"kind": "language", '
                                               '"language": "fr"}\' say.')] = None,
    pairs: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Pairs of texts that differ in what "
                                               "it is for; what a success is then follows from them.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What asks for the same in words, 'Answer in French.' say, "
                                                    "beside which the trial shows what was made.")] = None,
    effort: Annotated[str, typer.Option(help="How much is tried: quick, normal or thorough.")] = "quick",
    seed: Annotated[int, typer.Option(help="Seed of splits and random vectors.")] = 0,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Choose the layers and the strength of a stored vector anew, by what the model writes, as a new version."""
    if grader is None and pairs is None:
        raise InvalidRequest("nothing says which answers are a success", param="--grader",
                             fix="Give --grader with --prompts, or --pairs.")
    trial: dict[str, Any] = {"effort": effort}
    if grader is not None:
        trial["grader"] = json_or_text(grader)
    if instruction is not None:
        trial["instruction"] = instruction
    if prompts is not None:
        trial["prompts"] = prompts_of(prompts, "--prompts")
    body: dict[str, Any] = {"trial": trial, "seed": seed}
    if pairs is not None:
        body["pairs"] = read_records(pairs)
    with connect(url, key) as client:
        found = finish(client, client.start_tuning(ref, **body), None)
        out.print(stored_as(client, found.artifact))
