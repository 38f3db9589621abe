"""`trimtab artifacts`: the library of a running server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Column, Table
from trimtab_client import Artifact, Client

from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import Commands, out, print_json
from server.cli.given import json_object, layers_of
from server.cli.sae_files import with_beside

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The artifacts of the library.")

Ref = Annotated[str, typer.Argument(help='"name", "name@3" or "name@alias".')]
Everything = Annotated[bool, typer.Option("--all", help="Also those of other models.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PAGE = 200


@app.command("ls")
def list_(
    query: Annotated[str | None, typer.Argument(help="Searched in name, description and tags.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only of this kind.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only with this tag.")] = None,
    everything: Everything = False, as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """List the artifacts of the model that is served, one line per name."""
    with connect(url, key) as client:
        page = client.list_artifacts(q=query, kind=kind, tag=tag, all=everything, limit=PAGE)
        found = list(page.data)
        while page.cursor is not None:
            page = client.list_artifacts(q=query, kind=kind, tag=tag, all=everything, limit=PAGE, cursor=page.cursor)
            found += page.data
    if as_json:
        print_json([artifact.model_dump(mode="json") for artifact in found])
        return
    table = Table(Column("ref", overflow="fold"), "kind", "op", "site", "layers", "aliases", "model", "description",
                  box=None)
    for one in found:
        draft = marks(one.card or {})
        table.add_row(one.ref, one.kind, one.op or "read", one.site, shown_layers(one.layers, one.stored_layers),
                      " ".join(one.aliases), one.model_id or "", draft + escape(one.description))
    out.print(table)


@app.command()
def show(ref: Ref, as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """What one version is and how to use it; with --json everything that is recorded about it."""
    with connect(url, key) as client:
        found = client.get_artifact(ref)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    for name, value in described(found):
        out.print(f"[bold]{name:<12}[/bold]{escape(value)}")


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(exists=True, help="A .safetensors, .gguf, .npz or .pt file, or the folder of "
                                         "an SAE.")],
    name: Annotated[str | None, typer.Option(help="Name in the library; some files do not hold one.")] = None,
    metadata: Annotated[str | None, typer.Option(help='JSON object of fields that win over the file\'s, '
                                                 '\'{"site": "resid_post"}\' say.')] = None,
    first_layer: Annotated[int | None, typer.Option(help=".pt only: the layer of its vector, or of its first row, "
                                                    "where neither the file nor a JSON beside it nor its name says it; "
                                                    "-1 for the embedding's.")] = None,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """Take a file into the library. A .pt file is read here, weights only, and never sent. With an SAE the JSON beside
    it is sent along, and what the names of its folders say of site and layer."""
    fields = json_object(metadata or "{}", "--metadata")
    if name is not None:
        fields["name"] = name
    path, fields = with_beside(path, fields)
    data = path.read_bytes()
    if path.suffix in (".pt", ".pth", ".bin"):
        data, fields = _converted(path, fields, first_layer)
    with connect(url, key) as client:
        stored = client.import_artifact(data, fields or None)
        out.print(stored_as(client, stored.ref))
    for layer, found in ((stored.card or {}).get("reconstruction") or {}).get("layers", {}).items():
        out.print(f"at layer {layer} it explains {found['explained']:.1%} of the variance, with {found['l0']:g} "
                  "features a token")
    said = stored.provenance.get("layers_from")
    if said is not None:
        out.print(f"layers {', '.join(map(str, stored.stored_layers))}, as {said} says; site {stored.site}, strength "
                  f"{stored.strength['value']}")
    if stored.provenance.get("left_out_layers"):
        out.print(f"left out, as they hold nothing: layers {', '.join(map(str, stored.provenance['left_out_layers']))}")


@app.command()
def export(
    ref: Ref,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; by default by the name.")] = None,
    format: Annotated[Literal["safetensors", "gguf"], typer.Option(help="File format.")] = "safetensors",
    layers: Annotated[str | None, typer.Option(help="Only these layers: 3, 3,4 or 3-6. A reader of GGUF files applies "
                                               "every layer in the file.")] = None,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """Write an artifact to a file."""
    with connect(url, key) as client:
        artifact = client.get_artifact(ref)
        data = client.download_artifact(artifact.ref, format=format, layers=layers_of(layers))
    path = output or Path(f"{artifact.name}-{artifact.version}.{format}")
    path.write_bytes(data)
    out.print(f"wrote {path} ({len(data)} bytes)")


@app.command()
def delete(
    ref: Ref,
    force: Annotated[bool, typer.Option(help="Also if an alias, a preset or the default spec needs it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """Delete one version, or with a bare name all."""
    if not yes:
        typer.confirm(f"Delete {ref}{'' if '@' in ref else ' with all its versions'}?", abort=True)
    with connect(url, key) as client:
        out.print(f"deleted {', '.join(client.delete_artifact(ref, force=force))}")


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="Artifact.")],
    alias: Annotated[str, typer.Argument(help="Alias, production say.")],
    version: Annotated[int, typer.Argument(help="Version it shall point at.")],
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """Point an alias at a version."""
    with connect(url, key) as client:
        out.print(f"{name}@{alias} is now {client.set_alias(name, alias, version).ref}")


def marks(card: dict[str, Any]) -> str:
    """What a listing says of an artifact before its description: that it is a draft, or that its card warns."""
    if card.get("draft"):
        return "[bold yellow]draft[/bold yellow] "
    return "[yellow]warning[/yellow] " if card.get("warnings") else ""


def described(found: Artifact) -> Iterator[tuple[str, str]]:
    """What a person wants to know of an artifact, a line each."""
    card = found.card or {}
    yield "artifact", f"{found.ref}  {' '.join(f'@{alias}' for alias in found.aliases)}".rstrip()
    if found.description:
        yield "what", found.description
    yield "kind", f"{found.kind}, {'to be read' if found.op is None else f'for {found.op}'} at {found.site}"
    yield "acts on", shown_layers(found.layers, found.stored_layers)
    yield "strength", " ".join(str(part) for part in (found.strength.get("value"), found.strength.get("unit")) if part)
    band = (card.get("trial") or {}).get("band")
    if band:
        yield "band", f"{band['low']:g} to {band['high']:g}: visible, and the text whole"
    if found.model_id:
        yield "made on", found.model_id
    if "method" in found.provenance:
        yield "made by", str(found.provenance["method"])
    if card.get("test"):
        figures = {name: value for name, value in card["test"].items() if isinstance(value, int | float)}
        yield "on test", ", ".join(f"{name} {value:g}" for name, value in figures.items())
    for warning in card.get("warnings", []):
        yield "warning", str(warning)
    if found.tags:
        yield "tags", ", ".join(found.tags)
    yield "made", f"{found.created_at:%Y-%m-%d %H:%M}, {found.nbytes} bytes, sha256 {found.digest[:12]}"
    yield "use", json.dumps({"steering": {"artifact": found.ref}})
    yield "more", f"trimtab artifacts show {found.ref} --json"


def shown_layers(layers: Any, stored: list[int]) -> str:
    """Where it acts by default, and of how many layers there are numbers where it could act at others, too."""
    if layers is None:
        return f"layer {stored[0]}" if len(stored) == 1 else f"all {len(stored)} layers"
    if not isinstance(layers, list):
        return f"layers {layers} (of {len(stored)} made)"
    where = f"layer{'s' if len(layers) > 1 else ''} {','.join(map(str, layers))}"
    return where if len(layers) >= len(stored) else f"{where} (of {len(stored)} made)"


def _converted(path: Path, fields: dict[str, Any], first_layer: int | None) -> tuple[bytes, dict[str, Any]]:
    """The safetensors form of a .pt file, and the fields that are sent with it."""
    # torch loads slowly, and only this command needs it.
    from vectors.artifact import Limits
    from vectors.formats import get_format
    from vectors.formats.dictionaries.reading import is_dictionary, read_dictionary
    from vectors.formats.torch_pt import load_pt, read_pt

    content = load_pt(path, Limits())
    if is_dictionary(content):
        read = read_dictionary(content, fields, Limits())
        return get_format("safetensors").write(*read), {"sae": fields["sae"]} if "sae" in fields else {}
    fields.pop("sae", None)
    return get_format("safetensors").write(*read_pt(path, fields, Limits(), first_layer)), {}


def stored_as(client: Client, ref: str) -> str:
    """What was stored, and what the bare name means where that is another version."""
    name = ref.partition("@")[0]
    current = client.get_artifact(name).ref
    if current == ref:
        return f"stored {ref}"
    return (f"stored {ref}; {name} alone still means {current}, because its alias production points there "
            f"(trimtab artifacts alias {name} production {ref.partition('@')[2]} moves it)")
