"""`trimtab config`: what a server would be started with, what one runs with, and reading that again."""

from json import dumps as json_text
from pathlib import Path
from typing import Annotated

import typer

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from server.settings import Settings, load_settings

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The settings of a server.")
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


@app.command()
def show(everything: Annotated[bool, typer.Option("--all", help="Also those that have their default.")] = False,
         url: Url = DEFAULT_URL, key: Key = None) -> None:
    """The settings that hold on a running server, as JSON. Secrets are hidden."""
    with connect(url, key) as client:
        print_json({one.name: one.value for one in client.settings().settings if everything or not one.default})


@app.command()
def reload(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Have a running server read its file with settings and its secrets again, as SIGHUP does."""
    with connect(url, key) as client:
        done = client.reload_settings()
    for name, value in done.changed.items():
        out.print(f"{name} is now {json_text(value)}", soft_wrap=True, highlight=False, markup=False)
    for name in done.needs_restart:
        out.print(f"{name} changed and holds only after a restart", highlight=False)
    if not done.changed and not done.needs_restart:
        out.print("no setting changed")
    if done.certificates:
        out.print("the certificates were read again")


def shown(settings: Settings) -> dict[str, object]:
    """Settings that do not have their default, as plain values."""
    values = settings.model_dump(mode="json")
    defaults = {name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()}
    return {name: values[name] for name in sorted(settings.model_fields_set)
            if getattr(settings, name) != defaults[name]}
