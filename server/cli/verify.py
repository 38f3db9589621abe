"""`trimtab verify`."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from server.cli.console import err, out
from server.cli.models import settings_with_model

if TYPE_CHECKING:
    from server.verify.report import Report


def verify(
    model: Annotated[str, typer.Argument(envvar="TRIMTAB_MODEL", help="As for trimtab serve.")] = "lab-dense",
    engine: Annotated[Literal["transformers", "vllm"] | None, typer.Option(help="What runs the model.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"] | None, typer.Option(help="Where the model runs.")] = None,
    dtype: Annotated[Literal["auto", "float32", "float16", "bfloat16"] | None,
                     typer.Option(help="Number format of the weights.")] = None,
    overhead: Annotated[bool, typer.Option(help="Run the stock engine beside ours, which holds the model twice.")
                        ] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the whole report as JSON.")] = None,
) -> None:
    """Prove on this machine that steering is exact, and show what it costs and does. Ends with status 1 if not.

    Takes the settings that trimtab serve would take, from the same variables.
    """
    settings = settings_with_model(model, engine=engine, device=device, dtype=dtype)
    # Torch takes seconds to load, which `trimtab --help` need not wait for.
    from server.verify.run import verify as run

    report = asyncio.run(run(settings, lambda text: err.print(text, highlight=False), with_overhead=overhead))
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    show(report)
    if not report.passed:
        raise typer.Exit(1)


def show(report: "Report") -> None:
    """The report for people: a row of every case, the arms, the effect, and the verdict as the last line."""
    where = report.where
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    out.print(f"{where['model']} ({where['family']}) in {where['dtype']} on {where['device']}, engine "
              f"{where['engine']}; {versions}", highlight=False)
    table = Table("case", "off", "wrong strength", "wrong scope", "unsteered", "", title="Exactness: nats from plain "
                  f"hooks, of which {report.exactness[0].tolerance:g} are allowed; the wrong ones must be farther off",
                  title_justify="left")
    for one in report.exactness:
        figures = ["" if value is None else f"{value:.2g}" for value in
                   (one.off, one.wrong_strength, one.wrong_scope, one.unsteered)]
        table.add_row(one.name, *figures, "ok" if one.exact and one.controlled else "FAILED" if not one.exact
                      else "SHOWS NOTHING")
    out.print(table)
    if report.overhead is not None:
        arms = Table("arm", "tokens/s", "ratio to stock", "lowest", "highest", title="Overhead, by rounds in turns",
                     title_justify="left")
        for name, arm in report.overhead.items():
            arms.add_row(name, f"{arm.tokens_per_s:.0f}", f"{arm.ratio:.3f}", f"{arm.lowest:.3f}",
                         f"{arm.highest:.3f}")
        out.print(arms)
    effect = report.effect
    out.print(f"Effect: a vector of norm {effect.norm:.3g} at layer {effect.layer} moves completions by "
              f"{effect.steered:.3f} nats per token, {len(effect.placebo)} random vectors of that norm by "
              f"{sorted(effect.placebo)[len(effect.placebo) // 2]:.3f} (median), {max(effect.placebo):.3f} (largest); "
              f"it stands above {effect.above} of them. Engine and "
              f"hooks: {', '.join(f'{ours:.4f} and {theirs:.4f}' for ours, theirs in effect.hooks)}.", highlight=False)
    held = ", ".join(f"{name} {'holds' if good else 'FAILS'}" for name, good in report.verdicts.items())
    out.print(f"VERDICT after {report.seconds:.0f} s: {held}.", highlight=False)
