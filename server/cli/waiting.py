"""How a command waits for a job: a bar in a terminal, lines elsewhere, and where the job stands in the queue."""

from collections.abc import Mapping

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from trimtab_client import Client, Job

from server.cli.console import err, out

INTERRUPTED = 130
# Without a terminal there is a line whenever the stage changes, and for every so much of the work.
SHARE = 0.1


def finished(client: Client, job: Job, stages: Mapping[str, str]) -> Job:
    """The job once it has succeeded. stages: what each is in words. Ctrl-C cancels the job.

    Raises:
        JobFailed: it failed, or was cancelled.
    """
    if job.estimate_s is not None:
        err.print(f"this will take about {spoken(job.estimate_s)}, once it runs")
    try:
        return _with_bar(client, job, stages) if out.is_terminal else _with_lines(client, job, stages)
    except KeyboardInterrupt:
        client.cancel_job(job.id)
        err.print(f"cancelled {job.id}; nothing is stored")
        raise typer.Exit(INTERRUPTED) from None


def spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def said(job: Job, stages: Mapping[str, str]) -> str:
    """What a job does, or what it waits for."""
    if job.behind is None:
        return stages.get(job.stage, job.stage or "waiting")
    about = f" of {job.behind.about}" if job.behind.about else ""
    waits = "waits" if job.status == "queued" else "lets a shorter job pass"
    return f"{waits}: place {job.place} in the queue, behind {job.behind.kind}{about} ({job.behind.id})"


def _with_bar(client: Client, job: Job, stages: Mapping[str, str]) -> Job:
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                   TimeElapsedColumn(), console=out, transient=True)
    with bar:
        task = bar.add_task("waiting", total=1.0)
        return client.wait(job.id, on_progress=lambda state: bar.update(
            task, completed=state.progress, description=said(state, stages)))


def _with_lines(client: Client, job: Job, stages: Mapping[str, str]) -> Job:
    told: tuple[str, int] | None = None

    def show(state: Job) -> None:
        nonlocal told
        now = said(state, stages), int(state.progress / SHARE)
        if now != told and not state.finished:
            told = now
            err.print(f"{state.progress:4.0%} {now[0]}", soft_wrap=True)

    return client.wait(job.id, on_progress=show)
