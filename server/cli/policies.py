"""`trimtab policies`: what a tenant's requests may ask of steering."""

import json
from pathlib import Path
from typing import Annotated

import typer

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from steering.language.errors import InvalidRequest

app = typer.Typer(cls=Commands, no_args_is_help=True, help="What the requests of a tenant or key may ask of steering.")
Tenant = Annotated[str, typer.Argument(help="As its keys name it.")]
OfKey = Annotated[str | None, typer.Option("--key-id", help="Only of this key; by default of all the tenant's keys.")]


@app.command("list")
def show_all(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """All policies, as JSON."""
    with connect(url, key) as client:
        print_json([one.model_dump(mode="json") for one in client.policies()])


@app.command("set")
def set_rules(tenant: Tenant, file: Annotated[Path, typer.Argument(help="JSON with the rules, all of them.")],
              key_id: OfKey = None, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Set all rules of a policy. Those that the file leaves out do not hold."""
    try:
        policy = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{file} holds no JSON: {error}", param="FILE") from error
    if not isinstance(policy, dict):
        raise InvalidRequest(f"{file} holds no JSON object", param="FILE")
    with connect(url, key) as client:
        print_json(client.set_policy(tenant, policy, key_id=key_id).model_dump(mode="json"))


@app.command()
def delete(tenant: Tenant, key_id: OfKey = None, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Delete a policy: its rules do not hold any more."""
    with connect(url, key) as client:
        client.delete_policy(tenant, key_id=key_id)
    out.print("the policy is deleted")
