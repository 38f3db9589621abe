"""`trimtab calibrate`: how strong an artifact acts at which strength, so that doses in nats can be asked for."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from trimtab_client import Calibrated, Client

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import out
from server.cli.given import json_object, numbers
from server.cli.given import prompts as prompts_of
from server.cli.waiting import finished
from steering.language.errors import InvalidRequest

STAGES = {"range": "finding the range", "sweep": "measuring strengths", "placebo": "measuring random artifacts"}


def calibrate(
    ref: Annotated[str, typer.Argument(help='Artifact: "name", "name@3" or "name@alias".')],
    prompts: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Neutral prompts: plain lines, or JSON "
                                          "lines with text or messages.")],
    target: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Prompts of the behaviour, likewise; "
                                                "by default the neutral ones.")] = None,
    words: Annotated[str | None, typer.Option(help="Score the behaviour: completions with one of these words, "
                                              "separated by commas.")] = None,
    without: Annotated[str | None, typer.Option(help="Words that rule it out.")] = None,
    layers: Annotated[list[str] | None, typer.Option(help="Layers of one setting, 3 or 3,4; may be repeated. By "
                                                     "default the artifact's own.")] = None,
    scope: Annotated[str | None, typer.Option(help='Tokens that are touched, as JSON: {"prompt": "none"} say.')] = None,
    options: Annotated[str | None, typer.Option(help="Options of the op, as JSON, over the artifact's own.")] = None,
    strengths: Annotated[str | None, typer.Option(help="Raw strengths to measure, 0.5,1,2 say; by default they are "
                                                  "found.")] = None,
    reach: Annotated[str | None, typer.Option(help="Smallest and largest dose, in nats, that the curve should cover: "
                                              "0.02,2 say.")] = None,
    extend: Annotated[bool, typer.Option("--extend", help="Keep the curve that there is, and measure only what --reach "
                                         "lies beyond it.")] = False,
    points: Annotated[int, typer.Option(help="Strengths of each sign.")] = 5,
    draws: Annotated[int, typer.Option(help="Random artifacts of the placebo floor.")] = 20,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a completion.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of completions and draws.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", file_okay=False, help="Folder for the curves and the "
                                                "plots.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Measure an artifact at many strengths, beside random ones, and keep the curves in its card."""
    neutral = prompts_of(prompts, "--prompts")
    asked: dict[str, Any] = {"points": points, "draws": draws, "max_tokens": max_tokens, "seed": seed}
    if words is not None:
        asked["target"] = {"prompts": prompts_of(target, "--target") if target else neutral,
                             "scorer": {"kind": "words", "any": split(words), "none": split(without or "")}}
    elif target is not None or without is not None:
        raise InvalidRequest("a target needs words to score it by", param="--words", fix="Give --words.")
    if layers:
        asked["layers"] = [numbers(text, int, "--layers") for text in layers]
    if reach is not None:
        asked["reach"] = numbers(reach, float, "--reach")
    if extend:
        asked["extend"] = True
    if strengths is not None:
        asked["strengths"] = numbers(strengths, float, "--strengths")
    if scope is not None:
        asked["scope"] = json_object(scope, "--scope")
    if options is not None:
        asked["options"] = json_object(options, "--options")
    with connect(url, key) as client:
        done = finished(client, client.start_calibration(ref, neutral, **asked), STAGES)
        found = Calibrated.model_validate(done.result)
        for setting in found.settings:
            out.print(table(found.artifact, setting))
        if output is not None:
            _write(client, found, output)


def table(ref: str, setting: dict[str, Any]) -> Table:
    """The curve of one setting, with the floor where it was measured at the same strength."""
    floor = {row["strength"]: row for row in setting.get("floor", [])}
    shown = Table("strength", "KL per token", "random: median (range)", "perplexity", "repetition", "target", box=None,
                  title=f"{ref}, {setting['op']} at {'/'.join(setting['sites'])} "
                  f"{','.join(map(str, setting['layers']))}")
    rows = [(-1, row) for row in reversed(setting.get("down", []))] + [(0, setting["base"])]
    for sign, row in rows + [(1, row) for row in setting["up"]]:
        random = floor.get(row["strength"])
        band = "" if random is None else "{median:.3g} ({low:.3g} to {high:.3g})".format(**random["kl"])
        score = row.get("target")
        shown.add_row(f"{sign * row['strength']:g}", f"{row['kl']:.3g}", band, f"{row['perplexity']:.2f}",
                      f"{row['repetition']:.3f}", "" if score is None else f"{score:.3f}")
    return shown


def split(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def _write(client: Client, found: Calibrated, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = found.artifact.replace("@", "-")
    (folder / f"{name}.json").write_text(json.dumps(found.settings, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.png").write_bytes(client.calibration_plot(found.artifact, format="png"))
    (folder / f"{name}.svg").write_bytes(client.calibration_plot(found.artifact, format="svg"))
    out.print(f"wrote {name}.json, .png and .svg to {folder}")
