"""Which server a command talks to."""

from typing import Annotated

import typer
from trimtab_client import AsyncClient, Client

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="TRIMTAB_URL", help="The server to talk to.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar="TRIMTAB_API_KEY", show_envvar=True,
                                         help="Its key, if it has one.")]


def connect(url: str, key: str | None) -> Client:
    return Client(url, api_key=key)


def connect_async(url: str, key: str | None) -> AsyncClient:
    return AsyncClient(url, api_key=key)
