"""`trimtab doctor` and `trimtab version`."""

from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from server.cli.console import out
from server.cli.findings import all_checks
from server.cli.models import settings_with_model
from server.settings import load_settings


def doctor(
    model: Annotated[str, typer.Argument(envvar="TRIMTAB_MODEL", help="Model to try.")] = "lab-dense",
    skip_model: Annotated[bool, typer.Option(help="Do not load the model.")] = False,
    port: Annotated[int | None, typer.Option(help="Port to look at.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the library.")] = None,
) -> None:
    """Check this machine: packages, device, library, port, and that every site of the model is reached."""
    given = {"port": port, "data_dir": data_dir}
    settings = load_settings(**given) if skip_model else settings_with_model(model, **given)
    ill = 0
    for check in all_checks(settings, model=not skip_model):
        for finding in check():
            mark = "[green]ok[/green]  " if finding.good else "[red]bad[/red] "
            out.print(f"{mark} {finding.subject:<10} {escape(finding.found)}", highlight=False)
            if finding.fix is not None:
                ill += 1
                out.print(f"     [yellow]{escape(finding.fix)}[/yellow]", highlight=False)
    if ill:
        raise typer.Exit(1)


def version() -> None:
    """Versions of Trimtab and of what it runs on."""
    for name in ("trimtab", "torch", "transformers", "fastapi"):
        out.print(f"{name} {version_of(name)}", highlight=False)
