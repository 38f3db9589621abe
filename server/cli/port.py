"""`trimtab port`: an artifact of another checkpoint made to fit the served model."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from trimtab_client import Activations, Client, Ported

from server.cli.activations import STAGES as CAPTURE_STAGES
from server.cli.activations import text_of
from server.cli.artifacts import AsJson, Ref
from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import out, print_json
from server.cli.records import read_records
from server.cli.waiting import finished
from steering.language.errors import InvalidRequest

STAGES = {"read": "reading the same texts", "align": "fitting maps"}


def port(
    ref: Ref,
    name: Annotated[str, typer.Argument(help="What is stored is called so.")],
    activations: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Activations of the artifact's "
                                                     "own model, as `trimtab activations capture -o` wrote them there. "
                                                     "The artifact must be here already.")] = None,
    source: Annotated[str | None, typer.Option("--from", metavar="URL", help="A server of that model, instead: the "
                                               "artifact is fetched from it, and --texts are captured there.")] = None,
    source_key: Annotated[str | None, typer.Option("--from-api-key", help="Its key, if it has one.")] = None,
    texts: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="With --from: texts, one a line "
                                               "(.txt), or records with text, messages or tokens; several thousand "
                                               "tokens are good.")] = None,
    method: Annotated[str, typer.Option(help="orthogonal, ridge, cca, or auto: what fits texts held out "
                                             "best.")] = "auto",
    depth: Annotated[int | None, typer.Option(help="Layers of the source's model, where the two differ and --from does "
                                              "not tell.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Carry a vector, a subspace or a probe over from another checkpoint, by what both models hold inside while they
    read the same texts. Ctrl-C cancels."""
    if (activations is None) == (source is None) or (source is None) != (texts is None):
        raise InvalidRequest("give --activations, or --from with --texts", param="--from")
    with connect(url, key) as client:
        if source is not None and texts is not None:
            with connect(source, source_key) as other:
                ref, data, depth = _fetched(ref, texts, other, client, depth)
        else:
            assert activations is not None
            data = activations.read_bytes()
        captured = client.import_activations(data)
        job = client.start_port(ref, name, captured.id, method=method, depth=depth)  # type: ignore[arg-type]
        found = Ported.model_validate(finished(client, job, STAGES).result)
        client.delete_activations(captured.id)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(ported_table(found))
    for warning in found.warnings:
        out.print(escape(f"note: {warning}"))
    out.print(f"{found.artifact} is stored; its strength was not tried here: trimtab tune, or trimtab evaluate")


def _fetched(ref: str, path: Path, other: Client, client: Client, depth: int | None) -> tuple[str, bytes, int | None]:
    """The artifact as it is called here, its model's activations, and how many layers that has."""
    artifact = other.get_artifact(ref)
    layers: Any = artifact.layers if isinstance(artifact.layers, list) else "all"
    records = [text_of(record, n) for n, record in enumerate(read_records(path))]
    job = other.start_capture(records, {artifact.site: layers})
    kept = Activations.model_validate(finished(other, job, CAPTURE_STAGES).result)
    data = other.download_activations(kept.id)
    other.delete_activations(kept.id)
    stored = client.import_artifact(other.download_artifact(artifact.ref))
    return stored.ref, data, depth or other.capabilities().get("num_layers")


def ported_table(found: Ported) -> Table:
    table = Table("from layer", "to layer", "by", "explains", "shuffled", "coordinate", box=None,
                  title=f"{found.source} of {found.source_model}, {found.texts} texts, {found.held_out_texts} held out")
    for one in found.layers:
        table.add_row(str(one["source_layer"]), str(one["layer"]), one["method"], f"{one['explained']:.3f}",
                      f"{one['shuffled']:.3f}", f"{one['coordinate']:.3f}")
    return table
