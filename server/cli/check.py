"""`trimtab check`: whether what steers is what the model itself uses, and what interventions do to each other."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from trimtab_client import PatchCheck, StackCheck

from server.cli.artifacts import AsJson
from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from server.cli.records import read_records
from server.cli.steer import PresetName, SpecFile, Steer, steering_of
from server.cli.waiting import finished
from steering.language.errors import InvalidRequest

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Checks of directions and of specs.")
STAGES = {"read": "reading unpatched runs", "patch": "patching"}
STACK_STAGES = {"write": "writing continuations", "read": "reading activations", "measure": "measuring",
                "reorder": "trying other orders"}
# Fields of a record, either of which is the prompt.
FIELDS = ("prompt", "text", "messages", "tokens")


@app.callback()
def checks() -> None:
    """Checks of directions and of specs."""


@app.command()
def patch(
    data: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Pairs: records with base, source, "
                                         "base_answer and source_answer, and base_position and source_position where "
                                         "they are not the last token.")],
    artifact: Annotated[str, typer.Option(help="The direction: a vector, a subspace or a manifold of the library.")],
    layer: Annotated[int, typer.Option(help="At which layer.")],
    site: Annotated[str, typer.Option(help="Where: mlp_act, head_out, resid_pre or resid_post.")] = "resid_post",
    reader: Annotated[list[str] | None, typer.Option(help="In the residual stream, whose row space is visible: "
                                                     "unembedding, attention.LAYER, mlp.LAYER; may be repeated.")
                      ] = None,
    tolerance: Annotated[float, typer.Option(help="What readers see less than this share of their largest singular "
                                             "value is invisible.")] = 0.05,
    draws: Annotated[int, typer.Option(help="Random directions, at least 20.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Patch pairs of runs along a direction, along the part that its readers see and the part that they do not, and say
    whether it is faithful, illusory or without effect. Ctrl-C cancels."""
    pairs = read_records(data)
    if not all(isinstance(pair, dict) for pair in pairs):
        raise InvalidRequest("a pair is a record with base, source, base_answer and source_answer", param="data")
    with connect(url, key) as client:
        job = client.start_patch_check(pairs, site=site, layer=layer, artifact=artifact, readers=reader or [],
                                       tolerance=tolerance, draws=draws, seed=seed)
        found = PatchCheck.model_validate(finished(client, job, STAGES).result)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(check_table(found))
    for warning in found.warnings:
        out.print(f"note: {warning}")
    out.print(f"{found.verdict}. {found.rule}")


def check_table(found: PatchCheck) -> Table:
    table = Table("patched", "interchange", "decrease", "KL", "moved", box=None,
                  title=f"{found.site} {found.layer}: {found.pairs} pairs, visible {found.row_norm:.3f}, invisible "
                  f"{found.null_norm:.3f}")
    rows: list[tuple[str, Any]] = [("nothing", found.clean), ("everything", found.full),
                                   ("the direction", found.direction), ("its visible part", found.row),
                                   ("its invisible part", found.null)]
    for name, one in rows:
        if one is not None:
            table.add_row(name, f"{one['interchange']:.2f}", f"{one['decrease']:.3f}", f"{one['kl']:.3f}",
                          f"{one['moved']:.3g}")
    table.add_row(f"{len(found.random)} random, 95 %", "", f"{found.random_95:.3f}", "", "")
    return table


@app.command()
def spec(
    steer: Steer = None,
    preset: PresetName = None,
    spec: SpecFile = None,
    prompts: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Prompts, one a line (.txt), or "
                                                 "records with prompt, text, messages or tokens. By default the "
                                                 "server's own.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each continuation on which effects are measured.")] = 8,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """What the interventions of a spec do to each other: what one leaves of another, what all do beyond the sum of
    their own, and what to reorder or drop. Ctrl-C cancels."""
    steering = steering_of(steer, preset, spec)
    if steering is None:
        raise InvalidRequest("there is nothing to check", param="--steer",
                             fix="Give --steer twice, --preset or --spec.")
    texts = [] if prompts is None else [_prompt(record, n) for n, record in enumerate(read_records(prompts))]
    with connect(url, key) as client:
        job = client.start_spec_check(steering, prompts=texts, max_tokens=max_tokens)
        found = StackCheck.model_validate(finished(client, job, STACK_STAGES).result)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(stack_table(found))
    for one in found.advice:
        then = "" if one["kl"] is None else f" (the stack then has KL {one['kl']:.3g})"
        out.print(escape(f"{one['do']}: {one['text']}{then}"))
    out.print(f"{len(found.advice) or 'no'} advice. {found.rule}")


def stack_table(found: StackCheck) -> Table:
    table = Table("", "op", "artifact", "layers", "KL alone", box=None, title=f"predicted {found.interference:+.3g} "
                  f"nats beyond the sum of the parts, measured {found.measured_interference:+.3g}, on "
                  f"{found.tokens} tokens")
    for n, part in enumerate(found.interventions):
        table.add_row(str(n), part["op"], escape(part["artifact"] or "inline"), ",".join(map(str, part["layers"])),
                      f"{part['kl']:.3g}")
    table.add_row("", "all", "", "", f"{found.measured:.3g}")
    return table


def _prompt(record: Any, n: int) -> Any:
    if not isinstance(record, dict):
        return record
    given = [record[field] for field in FIELDS if field in record]
    if len(given) != 1:
        raise InvalidRequest(f"entry {n} has {len(given)} of the fields {', '.join(FIELDS)}", param="prompts",
                             fix="Give each entry one of them.")
    return given[0]
