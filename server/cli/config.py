"""`trimtab config`: what a server would be started with."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.console import Commands, out, print_json
from server.settings import Settings, load_settings

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The settings of a server, before it is started.")
ConfigFile = Annotated[Path | None, typer.Option("--config", help="File with settings, in YAML, or in TOML if it ends "
                                                 "in .toml. TRIMTAB_CONFIG says the same.")]


@app.command()
def check(config: ConfigFile = None, json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Read the settings as `trimtab serve` does, and print those that are set. Secrets are not shown."""
    settings = load_settings(config=config)
    found = shown(settings)
    if json:
        print_json(found)
        return
    for name, value in found.items():
        out.print(f"{name}: {value}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"{len(found)} settings are set, and all are valid")


def shown(settings: Settings) -> dict[str, object]:
    """Settings that do not have their default, as plain values."""
    values = settings.model_dump(mode="json")
    defaults = {name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()}
    return {name: values[name] for name in sorted(settings.model_fields_set)
            if getattr(settings, name) != defaults[name]}
