"""`trimtab activations`: what the model holds inside while it reads texts, captured by a running server."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from trimtab_client import Activations

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from server.cli.records import read_records
from server.cli.steer import PresetName, SpecFile, Steer, steering_of
from server.cli.waiting import finished
from steering.language.errors import InvalidRequest

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Captured activations: files with an id and a time.")
Id = Annotated[str, typer.Argument(help="Of the activations: act-...")]
STAGES = {"capturing": "capturing"}
# Fields of a record, either of which is the text.
FIELDS = ("text", "messages", "tokens")


@app.command()
def capture(
    data: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Texts, one a line (.txt), or records with "
                                         "text, messages or tokens.")],
    site: Annotated[str, typer.Option(help="Where to read: resid_post, mlp_out, ... as capabilities lists.")
                    ] = "resid_post",
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be repeated.")] = None,
    position: Annotated[list[int] | None, typer.Option(help="Token to read, negative from the end; may be repeated. By "
                                                       "default all.")] = None,
    mean: Annotated[bool, typer.Option("--mean", help="Of each text only the mean over its positions.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the file here.")] = None,
    steer: Steer = None,
    preset: PresetName = None,
    spec: SpecFile = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Capture the activations of texts. Ctrl-C cancels."""
    texts = [text_of(record, n) for n, record in enumerate(read_records(data))]
    with connect(url, key) as client:
        job = client.start_capture(texts, {site: layer or "all"}, positions=position, pool="mean" if mean else "none",
                                   dtype=dtype, steering=steering_of(steer, preset, spec))  # type: ignore[arg-type]
        found = Activations.model_validate(finished(client, job, STAGES).result)
        if output is not None:
            _write(client.stream_activations(found.id), output)
    out.print(f"{found.id}: {found.rows} rows of {found.texts} texts, {found.bytes} bytes"
              + ("" if output is None else f", written to {output}"))


@app.command("ls")
def list_(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """List what is kept."""
    with connect(url, key) as client:
        found = client.list_activations().data
    table = Table(Column("id", overflow="fold"), "model", "sites", "rows", "bytes", "kept until", box=None)
    for one in found:
        sites = ", ".join(f"{site} {layers[0]}..{layers[-1]}" for site, layers in one.sites.items())
        table.add_row(one.id, one.model, sites, str(one.rows), str(one.bytes),
                      f"{datetime.fromtimestamp(one.expires_at):%Y-%m-%d %H:%M}")
    out.print(table if found else "no activations are kept")


@app.command()
def show(id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """What is told of one, as JSON."""
    with connect(url, key) as client:
        print_json(client.get_activations(id).model_dump(mode="json"))


@app.command()
def download(id: Id, output: Annotated[Path, typer.Argument(help="Where to write the safetensors file.")],
             url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Write the file."""
    with connect(url, key) as client:
        _write(client.stream_activations(id), output)
    out.print(f"{output}: {output.stat().st_size} bytes")


@app.command()
def delete(id: Id, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Remove one before its time."""
    with connect(url, key) as client:
        client.delete_activations(id)
    out.print(f"{id} is gone")


def text_of(record: Any, n: int) -> Any:
    if not isinstance(record, dict):
        return record
    given = [record[field] for field in FIELDS if field in record]
    if len(given) != 1:
        raise InvalidRequest(f"entry {n} has {len(given)} of the fields {', '.join(FIELDS)}", param="data",
                             fix="Give each entry one of them.")
    return given[0]


def _write(pieces: Any, path: Path) -> None:
    """Under another name first, so that a broken download leaves no file that looks whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for piece in pieces:
                file.write(piece)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
