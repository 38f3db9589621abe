"""How steering is written on the command line: `-s cheerful`, `-s cheerful@3=1.5`, `-s cheerful=-2rel`."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from steering.language.errors import InvalidSpec

Steer = Annotated[list[str] | None, typer.Option(
    "--steer", "-s", metavar="NAME[=STRENGTH]", help="Artifact and strength: cheerful, cheerful@3=1.5, refusal, "
    "cheerful=-2rel, cheerful=0.5kl (units raw, unit, rel, sigma, kl). May be repeated; order is meaning.")]
PresetName = Annotated[str | None, typer.Option("--preset", "-p", help="A stored preset; acts before --steer.")]
SpecFile = Annotated[Path | None, typer.Option("--spec", exists=True, dir_okay=False,
                                               help="JSON file with a whole `steering` object.")]
Weak = Annotated[list[str] | None, typer.Option(
    "--weak", metavar="NAME[=STRENGTH]", help="Decode from the difference between the steered run and one with this "
    "artifact; `untouched` for the model without steering. May be repeated.")]
Alpha = Annotated[float, typer.Option(help="With --weak: least share of the likeliest token's probability that a token "
                                      "must have.")]
Beta = Annotated[float, typer.Option(help="With --weak: how much of the difference is added.")]
UNTOUCHED = "untouched"
_WRITTEN = re.compile(r"(?P<ref>[^=]+)(=(?P<value>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)(?P<unit>[a-z]+)?)?", re.ASCII)


def steering_of(steer: list[str] | None, preset: str | None = None, spec: Path | None = None) -> dict[str, Any] | None:
    """The `steering` object of a request, None if nothing was given.

    Raises:
        InvalidSpec: a wrong form, or a file beside the other options.
    """
    if spec is not None:
        if steer or preset:
            raise InvalidSpec("--spec is the whole spec", param="--spec", fix="Leave --steer and --preset out.")
        return read_object(spec)
    if not steer and preset is None:
        return None
    wanted: dict[str, Any] = {"interventions": [_intervention(text) for text in steer or []]}
    return wanted if preset is None else {**wanted, "preset": preset}


def contrasted(steering: dict[str, Any] | None, weak: list[str] | None, alpha: float, beta: float
               ) -> dict[str, Any] | None:
    """The `steering` object with a contrast to what acts in the weak run."""
    if not weak:
        return steering
    given = [] if weak == [UNTOUCHED] else [_intervention(text, "--weak") for text in weak]
    return {**(steering or {}), "contrast": {"weak": {"interventions": given}, "alpha": alpha, "beta": beta}}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidSpec(f"{path} is no JSON: {error}", param="--spec") from error
    if not isinstance(value, dict):
        raise InvalidSpec(f"{path} holds no JSON object", param="--spec")
    return value


def _intervention(text: str, option: str = "--steer") -> dict[str, Any]:
    match = _WRITTEN.fullmatch(text)
    if match is None:
        raise InvalidSpec(f"{text!r} is not of the form NAME or NAME=STRENGTH", param=option,
                          fix="Write cheerful, cheerful@3=1.5 or cheerful=-2rel.")
    intervention: dict[str, Any] = {"artifact": match["ref"]}
    if match["value"] is not None:
        value = float(match["value"])
        # The server knows the units, and refuses one that is none with the field named.
        intervention["strength"] = value if match["unit"] is None else {"value": value, "unit": match["unit"]}
    return intervention
