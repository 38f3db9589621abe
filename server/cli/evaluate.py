"""`trimtab evaluate`: grade what the model writes under an artifact, a preset or a spec, beside random artifacts."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from trimtab_client import Client

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import out
from server.cli.given import json_object, numbers, questions
from server.cli.waiting import finished
from steering.language.errors import InvalidRequest

STAGES = {"untouched": "the untouched model", "steered": "the spec", "random": "random artifacts"}


def evaluate(
    subject: Annotated[str, typer.Argument(help='Artifact ("name", "name@3"), preset (with --preset), or a spec as '
                                           "JSON.")],
    prompts: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Prompts: plain lines, or JSON lines with "
                                          "text or messages and, for right answers, expected.")],
    grader: Annotated[list[str], typer.Option(help="How answers are graded; may be repeated: refusal, sentiment, "
                                              "language=fr, regex=PATTERN, length, whole, or a grader as JSON.")],
    preset: Annotated[bool, typer.Option("--preset", help="The argument names a preset.")] = False,
    dose: Annotated[str, typer.Option(help="What strengths are multiplied with, 0.5,1,2 say.")] = "1",
    draws: Annotated[int, typer.Option(help="Random artifacts of equal size at each dose.")] = 20,
    controls: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Prompts on which nothing should "
                                                  "change.")] = None,
    tasks: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Unrelated questions: JSON lines with "
                                               "text and expected.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a completion.")] = 48,
    temperature: Annotated[float, typer.Option(help="Of the completions.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of completions and draws.")] = 0,
    samples: Annotated[int, typer.Option(help="Texts of each arm to keep and print.")] = 8,
    output: Annotated[Path | None, typer.Option("--output", "-o", file_okay=False, help="Folder for the report as "
                                                "JSON, page and picture.")] = None,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """Grade what the model writes beside the untouched model and random artifacts of equal size; keep the report."""
    named: dict[str, Any] = {"preset": subject} if preset else {"spec": _spec(subject)}
    doses = numbers(dose, float, "--dose")
    neutral = [] if controls is None else [prompt for prompt, _ in questions(controls, "--controls")]
    unrelated = [] if tasks is None else _with_answers(tasks, "--tasks")
    options = {**named, "doses": doses, "draws": draws, "max_tokens": max_tokens, "seed": seed,
               "temperature": temperature, "samples": samples, "controls": neutral, "tasks": unrelated}
    asked = _with_answers(prompts, "--prompts")
    out.print(f"{1 + len(doses) * (1 + draws)} arms of {len(asked) + len(neutral) + len(unrelated)} completions, "
              f"{max_tokens} tokens each at the most")
    with connect(url, key) as client:
        job = client.start_evaluation(asked, [_grader(text) for text in grader], **options)
        report = client.evaluation((finished(client, job, STAGES).result or {})["id"])
        show(report)
        out.print(f"stored as {report['id']}; read it at {url.rstrip('/')}/v1/evaluations/{report['id']}/report")
        if output is not None:
            _write(client, report, output)


def show(report: dict[str, Any]) -> None:
    """The shares as a table, what they say, and texts side by side."""
    table = Table("arm", *(f"success: {one['kind']}" for one in report["graders"]), "broken", "KL per token", box=None)
    if mandatory := report.get("mandatory"):
        out.print(f"a mandatory spec acted in front of every arm: {', '.join(mandatory)}", markup=False)
    rows = [("untouched", report["untouched"])]
    for one in report["results"]:
        dose = one["steered"]["dose"]
        rows.append((f"dose {dose:g}", one["steered"]))
        if one["random"]:
            best = max(one["random"], key=lambda arm: arm["graded"][0]["success"]["share"])
            rows.append((f"best of {len(one['random'])} random, dose {dose:g}", best))
    for name, arm in rows:
        table.add_row(name, *(_share(one["success"]) for one in arm["graded"]), _share(arm["graded"][0]["broken"]),
                      f"{arm['kl']:.3g}")
    out.print(table)
    for one in report["results"]:
        for grader, said in zip(report["graders"], one["verdict"], strict=True):
            out.print(f"dose {one['steered']['dose']:g}, {grader['kind']}: {said}", markup=False)
    for n, prompt in enumerate(report["shown"]):
        out.print(f"\n> {prompt}", markup=False)
        arms = [("untouched", report["untouched"]),
                *((f"dose {one['steered']['dose']:g}", one["steered"]) for one in report["results"]),
                *((f"random, dose {one['steered']['dose']:g}", one["random"][0]) for one in report["results"]
                  if one["random"])]
        for name, arm in arms:
            sample = arm["samples"][n]
            out.print(f"  {name} ({', '.join(sample['outcomes'])}): {sample['text'].strip()}", markup=False)


def _with_answers(path: Path, option: str) -> list[Any]:
    return [prompt if expected is None else {"prompt": prompt, "expected": expected}
            for prompt, expected in questions(path, option)]


def _spec(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        given = json_object(text, "SUBJECT")
        return given if "interventions" in given else {"interventions": [given]}
    return {"interventions": [{"artifact": text}]}


def _grader(text: str) -> dict[str, Any]:
    """A grader of one word, of a word and its main option, or as JSON."""
    if text.lstrip().startswith("{"):
        return json_object(text, "--grader")
    # The graders bring libraries along that take seconds to import.
    from vectors.evaluate.graders.named import spelled

    try:
        return spelled(text)
    except InvalidRequest as error:
        raise error.about("--grader") from None


def _share(share: dict[str, Any]) -> str:
    return f"{share['share']:.0%} ({share['low']:.0%} to {share['high']:.0%})"


def _write(client: Client, report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_bytes(client.evaluation_page(report["id"]))
    (folder / "report.png").write_bytes(client.evaluation_picture(report["id"]))
    out.print(f"wrote report.json, report.html and report.png to {folder}")
