"""What all commands share: where output goes and how errors look."""

import json
import sys
from typing import Any, NoReturn

import trimtab_client
import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from steering.language.errors import TrimtabError

# A pipe has no width. Rich would guess 80 columns and cut names in tables short.
PIPE_WIDTH = 200
out = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True)


class Commands(TyperGroup):
    """A group of commands whose known errors end in one line and status 1, never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TrimtabError as error:
            fail(error.message, code=error.code, param=error.param, fix=error.fix)
        except trimtab_client.ServerRefused as error:
            fail(str(error), code=error.code, param=error.param)
        except trimtab_client.JobFailed as error:
            fail(str(error), code=error.code, param=error.param)
        except trimtab_client.ConnectionFailed as error:
            fail(str(error), fix="Is the server running? Start it with: trimtab serve. Name another one with --url.")


def fail(message: str, *, code: str | None = None, param: str | None = None, fix: str | None = None) -> NoReturn:
    """Say what is wrong, where and what to do, on standard error; ends the program with status 1. Of a message of many
    lines, as libraries write them, the first paragraph is said."""
    message = " ".join(message.strip().partition("\n\n")[0].split())
    place = f" [dim]({escape(param)})[/dim]" if param else ""
    named = f" {escape(code)}" if code else ""
    err.print(f"[bold red]error[/bold red]{named}: {escape(message)}{place}", soft_wrap=True)
    if fix:
        err.print(escape(fix), soft_wrap=True)
    raise typer.Exit(1)


def print_json(value: Any) -> None:
    """Plain JSON, for other programs: no colours, no wrapping."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
