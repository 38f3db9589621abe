"""`trimtab measure`: what the model is like inside, on texts of one's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from trimtab_client import Extracted

from server.cli.artifacts import AsJson, stored_as
from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from server.cli.extract import STAGES
from server.cli.given import prompts as prompts_of
from server.cli.waiting import finished

app = typer.Typer(cls=Commands, no_args_is_help=True, help="What the model is like inside, on texts of one's own.")


@app.callback()
def measure() -> None:
    """What the model is like inside, on texts of one's own."""


@app.command()
def sparsity(
    prompts: Annotated[Path, typer.Option("--prompts", "-p", exists=True, dir_okay=False, help="Texts: plain lines, or "
                                          "JSON lines with text or messages.")],
    name: Annotated[str, typer.Option(help="Artifact to store the thresholds as.")],
    site: Annotated[str, typer.Option(help="Inputs of which map: mlp_act or head_out.")] = "mlp_act",
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be repeated.")] = None,
    method: Annotated[str, typer.Option(help="What the artifact leaves out by: chess, threshold, wina or "
                                        "magnitude.")] = "chess",
    share: Annotated[float, typer.Option(help="How much it leaves out.")] = 0.5,
    tokens: Annotated[int, typer.Option(help="Most tokens that set thresholds, and most that test them.")] = 2048,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """How sparse the inputs of the MLPs or of the attention's output are, and an artifact with thresholds for sparsify.

    A channel is lazy if it is among the largest tenth on less than one token in a hundred.
    """
    with connect(url, key) as client:
        job = client.start_extraction(
            method="sparsity", name=name, prompts=prompts_of(prompts, "--prompts"), site=site, layers=layer or "all",
            share=share, max_calibration=tokens, leave_out_by=method)
        found = Extracted.model_validate(finished(client, job, STAGES).result)
        if as_json:
            print_json(found.report)
            return
        out.print(sparsity_table(found.report))
        out.print(stored_as(client, found.artifact))


def sparsity_table(report: Mapping[str, Any]) -> Table:
    table = Table("layer", "zeros", "needed for 90 %", "lazy", "lazy, dealt anew", "columns vary", "left out at 0.5",
                  box=None, title=f"inputs of the map behind {report['site']}")
    for layer, one in report["layers"].items():
        shares = (one["zeros"], one["needed"], one["lazy"], one["lazy_dealt"])
        table.add_row(layer, *(f"{share:.1%}" for share in shares), f"{one['norm_variation']:.2f}",
                      f"{one['left_out']['0.5']['chess']:.1%}")
    return table
