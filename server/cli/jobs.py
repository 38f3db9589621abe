"""`trimtab jobs`: what a running server does in the background."""

from datetime import datetime
from typing import Annotated

import typer
from rich.table import Column, Table
from trimtab_client import Job

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from server.cli.waiting import finished, said, spoken

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The jobs of a server: extractions, calibrations, "
                                                           "evaluations.")
Id = Annotated[str, typer.Argument(help="Of the job: job-...")]


@app.command("ls")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Also those that are over.")] = False,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """List jobs that wait or run, with their places in the queue."""
    with connect(url, key) as client:
        found = [job for job in client.jobs().data if everything or not job.finished]
    table = Table(Column("id", overflow="fold"), "what", "of", "status", "done", "now", "takes about", box=None)
    for job in sorted(found, key=lambda job: (job.place is None, job.place or 0)):
        table.add_row(job.id, job.kind, job.about, job.status, f"{job.progress:.0%}", _now(job),
                      "" if job.estimate_s is None else spoken(job.estimate_s))
    out.print(table if found else "no job waits or runs; --all lists those that are over")


@app.command()
def show(job_id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """One job with its result or its error, as JSON."""
    with connect(url, key) as client:
        print_json(client.get_job(job_id).model_dump(mode="json"))


@app.command()
def wait(job_id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Follow a job until it is over. Ctrl-C cancels it."""
    with connect(url, key) as client:
        done = finished(client, client.get_job(job_id), {})
    print_json(done.result)


@app.command()
def cancel(job_id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Stop a job. Nothing of it is stored."""
    with connect(url, key) as client:
        out.print(f"{client.cancel_job(job_id).id} is told to stop")


def _now(job: Job) -> str:
    if not job.finished:
        return said(job, {})
    if job.error is not None:
        return str(job.error.get("message", ""))
    return "" if job.finished_at is None else f"over since {datetime.fromtimestamp(job.finished_at):%Y-%m-%d %H:%M}"
