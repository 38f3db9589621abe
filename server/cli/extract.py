"""`trimtab extract`: a direction from contrastive pairs, with a progress bar."""

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from trimtab_client import Client, Extracted, Job

from server.cli.bundled import locate_model
from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import out
from server.cli.pairs import read_pairs

Method = Literal["mean_difference", "pca_pairwise", "pca_repe", "logistic_probe"]
STAGES = {"capture": "reading activations", "fit": "fitting", "control": "fitting controls"}


def extract(
    method: Annotated[Method, typer.Argument(help="How the direction is fitted.")],
    pairs: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="JSON lines with positive, negative, and if "
                                        "known item and split.")],
    name: Annotated[str, typer.Option(help="Artifact to store it as.")],
    site: Annotated[str, typer.Option(help="Where to read.")] = "resid_post",
    token: Annotated[str, typer.Option(help="Token to read: last, mean or a position.")] = "last",
    op: Annotated[str, typer.Option(help="What it is meant for: add, ablate or clamp.")] = "add",
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of splits and controls.")] = 0,
    description: Annotated[str, typer.Option(help="What it does, for people.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="Label; may be repeated.")] = None,
    offline: Annotated[str | None, typer.Option(metavar="MODEL", help="Load this model here instead of using a running "
                                                "server, and write the artifact to --output.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the artifact to this file.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Take a direction from contrastive pairs and store it in the library of a running server."""
    options: dict[str, Any] = {
        "method": method, "name": name, "site": site, "op": op, "seed": seed, "description": description,
        "token": int(token) if token.lstrip("-").isdigit() else token, "tags": tag or [],
        "layers": layer or "all"}
    given = read_pairs(pairs)
    if offline is None:
        with connect(url, key) as client:
            found = run(client, given, options, output)
        out.print(f"stored {found.artifact}")
    else:
        _offline(locate_model(offline), given, options, output or Path(f"{name}.safetensors"))


def run(client: Client, pairs: list[dict[str, Any]], options: dict[str, Any], output: Path | None) -> Extracted:
    """Run the job with a progress bar, print its report, write the file if one is wanted. Ctrl-C cancels the job."""
    job = client.start_extraction(pairs, **options)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                   TimeElapsedColumn(), console=out, transient=True)
    with bar:
        task = bar.add_task("waiting", total=1.0)

        def show(state: Job) -> None:
            bar.update(task, completed=state.progress, description=STAGES.get(state.stage, "waiting"))

        try:
            done = client.wait(job.id, on_progress=show)
        except KeyboardInterrupt:
            client.cancel_job(job.id)
            raise
    found = Extracted.model_validate(done.result)
    out.print(report_table(found.report))
    if output is not None:
        output.write_bytes(client.download_artifact(found.artifact))
        out.print(f"wrote {output}")
    return found


def report_table(report: dict[str, Any]) -> Table:
    """Held-out scores per layer beside those of the controls."""
    table = Table("layer", "dev AUC", "test AUC", "pair accuracy", "separation", "norm", "random AUC (max)",
                  "percentile", title=f"{report['method']} at {report['site']}, {report['pairs']['test']} test pairs",
                  box=None)
    for layer, scores in report["layers"].items():
        chosen = int(layer) == report["best_layer"]
        random = scores["control"]["covariance"]
        table.add_row(f"{layer}{' *' if chosen else ''}", f"{scores['dev']['auc']:.3f}", f"{scores['test']['auc']:.3f}",
                      f"{scores['test']['pair_accuracy']:.3f}", f"{scores['test']['separation']:.2f}",
                      f"{scores['norm']:.3g}", f"{random['max_auc']:.3f}", f"{random['percentile']:.0f}",
                      style="bold" if chosen else "")
    shuffled = report["shuffled_labels"]
    table.caption = (f"* best on dev. Labels shuffled: AUC {shuffled['mean_auc']:.3f} on average, at most "
                     f"{shuffled['max_auc']:.3f}; percentile {shuffled['percentile']:.0f}")
    return table


def _offline(model: str, pairs: list[dict[str, Any]], options: dict[str, Any], output: Path) -> None:
    # Only this branch loads the model, and torch with it.
    from server.boot import build
    from server.cli.inprocess import running
    from server.logs import configure_logging
    from server.settings import load_settings

    configure_logging("console")
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        settings = load_settings(model=model, data_dir=Path(folder), host="127.0.0.1")
        key = settings.api_key
        with running(build(settings)) as url, connect(url, None if key is None else key.get_secret_value()) as client:
            run(client, pairs, options, output)
