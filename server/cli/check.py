"""`trimtab check`: whether what steers is what the model itself uses."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from trimtab_client import PatchCheck

from server.cli.artifacts import AsJson
from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from server.cli.records import read_records
from server.cli.waiting import finished
from steering.language.errors import InvalidRequest

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Checks of directions.")
STAGES = {"read": "reading unpatched runs", "patch": "patching"}


@app.callback()
def checks() -> None:
    """Checks of directions."""


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
