"""`trimtab audit`: who changed what on a server, and whether the record of it is whole."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from trimtab_client import Client
from trimtab_client.models import AuditRecord, AuditVerdict

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, err, out
from steering.language.errors import InvalidRequest

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Who changed what, as a chain of records.")
AT_ONCE = 500
POLL_S = 1.0


@app.command()
def tail(lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=AT_ONCE, help="Records at most.")] = 20,
         follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with those that come.")] = False,
         action: Annotated[str | None, typer.Option(help="Only this action, or those that begin so: preset.")] = None,
         tenant: Annotated[str | None, typer.Option(help="Only what keys of this tenant did.")] = None,
         url: Url = DEFAULT_URL, key: Key = None) -> None:
    """The newest records, the last one at the end."""
    with connect(url, key) as client:
        page = client.audit(limit=lines, action=action, tenant=tenant)
        _print(page.data[::-1])
        last = page.head.number
        while follow:
            time.sleep(POLL_S)
            page = client.audit(after=last, action=action, tenant=tenant, limit=AT_ONCE)
            _print(page.data)
            last = page.data[-1].number if len(page.data) == AT_ONCE else max(last, page.head.number)


@app.command()
def export(file: Annotated[Path | None, typer.Argument(help="Default: standard output.")] = None,
           after: Annotated[int, typer.Option(min=0, help="Only records with larger numbers.")] = 0,
           url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Write all records as JSON lines, oldest first."""
    count = 0
    with connect(url, key) as client, (nullcontext(sys.stdout) if file is None else file.open(
            "w", encoding="utf-8")) as target:
        for record in _all(client, after):
            target.write(record.model_dump_json() + "\n")
            count += 1
    err.print(f"{count} records")


@app.command("verify")
def check(file: Annotated[Path | None, typer.Argument(help="An export. Without it the server's own records are "
                                                      "checked.")] = None,
          known: Annotated[str | None, typer.Option(metavar="NUMBER:DIGEST", help="A record that was noted before, and "
                                                    "has to be there still.")] = None,
          url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Check that no record was altered or taken out, and print the last one to note elsewhere. Exit status 1 if one
    was."""
    noted = None if known is None else _noted(known)
    if file is None:
        with connect(url, key) as client:
            found = client.verify_audit(*(noted or (None, None)))
    else:
        found = _verified(file, noted)
    if found.fault is not None:
        err.print(f"the chain is broken: {found.fault}", soft_wrap=True)
        raise typer.Exit(1)
    out.print(f"{found.records} records are whole; the last one is {found.last or 0}:{found.head}", soft_wrap=True)


def _all(client: Client, after: int) -> Iterator[AuditRecord]:
    while found := client.audit(after=after, limit=AT_ONCE).data:
        yield from found
        after = found[-1].number


def _verified(file: Path, noted: tuple[int, str] | None) -> AuditVerdict:
    # The library brings torch along, which takes seconds to import.
    from vectors.library.audit.chain import Record, verify

    with file.open(encoding="utf-8") as lines:
        found = verify((Record(**AuditRecord.model_validate_json(line).model_dump()) for line in lines if line.strip()),
                       known=noted)
    return AuditVerdict(whole=found.fault is None, **vars(found))


def _noted(text: str) -> tuple[int, str]:
    number, _, digest = text.partition(":")
    if not number.isdigit() or len(digest) != 64:
        raise InvalidRequest("it is no number and digest", param="--known",
                             fix="Give it as `trimtab audit verify` printed it.")
    return int(number), digest


def _print(records: list[AuditRecord]) -> None:
    table = Table("number", "time", "who", "from", "action", "target", "before", "after", box=None, show_header=False)
    for one in records:
        table.add_row(str(one.number), one.at.strftime("%Y-%m-%d %H:%M:%S"), f"{one.tenant}/{one.key_name}",
                      one.address, one.action, one.target, _short(one.before), _short(one.after))
    if records:
        out.print(table)


def _short(value: object) -> str:
    text = "" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
