"""`trimtab library`: what the library of a running server holds, and its housekeeping."""

from typing import Annotated

import typer
from rich.table import Table

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The library as a whole: what it holds, and housekeeping.")


@app.command()
def usage(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """What the library holds, and its limits."""
    with connect(url, key) as client:
        held = client.library()
    table = Table("", "held", "limit", box=None)
    for name, now, limit in (("names", held.names, held.max_names), ("versions", held.versions, held.max_versions),
                             ("bytes", held.bytes, held.max_bytes)):
        table.add_row(name, f"{now:,}", "none" if limit is None else f"{limit:,}")
    out.print(table)


@app.command()
def gc(min_age_s: Annotated[float, typer.Option(min=60, help="Only what is at least so many seconds old.")] = 3600.0,
       url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Remove from the storage what deleted versions and crashes left."""
    with connect(url, key) as client:
        found = client.collect_library(min_age_s=min_age_s)
    out.print(f"removed {found.blobs} unused blobs and {found.partial} half-written files, {found.bytes:,} bytes")
