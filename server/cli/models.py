"""The model that a command is given, made ready to be loaded: bundled, in a package, a GGUF file, a folder, an id."""

from typing import Any

from rich.progress import BarColumn, DownloadColumn, TextColumn
from rich.progress import Progress as Bar

from server.checkpoints.cache import ModelCache
from server.checkpoints.progress import Progress
from server.checkpoints.ready import make_ready
from server.cli.bundled import locate_model
from server.cli.console import err
from server.settings import Settings, load_settings


def settings_with_model(model: str, **given: Any) -> Settings:
    """Settings whose model can be loaded. Says on standard error what it does if that takes long.

    Raises:
        InvalidSettings, and see `make_ready` and `locate_model`.
    """
    settings = load_settings(model=locate_model(model), **given)
    with Bar(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=err, transient=True,
             disable=not err.is_terminal) as bar:
        ready = make_ready(settings.model, ModelCache(settings.cache_folder), _shown(bar))
    return settings.model_copy(update={"model": ready})


def _shown(bar: Bar) -> Progress:
    """Each step as a line; on a terminal a bar moves below it."""
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            err.print(what, soft_wrap=True, highlight=False)
            tasks[what] = bar.add_task("", total=total or None)
        bar.update(tasks[what], completed=done, visible=0 < done < total)

    return progress
