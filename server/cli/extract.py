"""`trimtab extract`: an artifact from data of one's own, by any method that the server offers, with a progress bar."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from trimtab_client import Client, Extracted, Job, Method

from server.cli.artifacts import stored_as
from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import out
from server.cli.given import assigned, json_or_text
from server.cli.given import prompts as prompts_of
from server.cli.models import settings_with_model
from server.cli.records import read_records
from server.cli.reports import rendered
from server.cli.shapes import entries
from server.cli.waiting import finished
from steering.language.errors import InvalidRequest

STAGES = {"capture": "reading activations", "fit": "fitting", "control": "measuring controls",
          "trial": "trying it out"}


def extract(
    method: Annotated[str | None, typer.Argument(help="How it is made: mean-difference, function-vector, ... "
                                                 "(--list names them all).")] = None,
    data: Annotated[Path | None, typer.Option("--data", "--pairs", "-d", exists=True, dir_okay=False, help="JSON, JSON "
                                              "lines, CSV, TSV or text.")] = None,
    name: Annotated[str | None, typer.Option(help="Artifact to store it as.")] = None,
    target: Annotated[str | None, typer.Option(help="The label that is wanted, where texts have labels.")] = None,
    where: Annotated[list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only entries with this value; may be "
                                                    "repeated.")] = None,
    column: Annotated[list[str] | None, typer.Option(metavar="FIELD=COLUMN", help="Take a field from a column of "
                                                     "another name; may be repeated.")] = None,
    prefix: Annotated[str, typer.Option(help="Text put before every plain text or word, a space say.")] = "",
    suffix: Annotated[str, typer.Option(help="Text put behind every plain text, ' He felt' say.")] = "",
    also: Annotated[list[str] | None, typer.Option(metavar="FIELD=FILE", help="Data of a further field, "
                                                   "other_pairs=plural.json say; may be repeated.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of the "
                                                       "method, as JSON or text (--fields names them).")] = None,
    site: Annotated[str | None, typer.Option(help="Where to read.")] = None,
    token: Annotated[str | None, typer.Option(help="Token to read: differing, which is what is "
                                                      "found by comparing the two texts of a pair, last_differing, "
                                                      "last, mean, or a position.")] = None,
    op: Annotated[str | None, typer.Option(help="What it is meant for: add, ablate or clamp.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be repeated.")] = None,
    effort: Annotated[str | None, typer.Option(help="How much is tried: none, quick, normal or thorough.")] = None,
    grader: Annotated[str | None, typer.Option(metavar="JSON", help='What a success is, \'{"kind": "language", '
                                               '"language": "fr"}\' say; by default what the pairs differ in.')] = None,
    prompts: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Questions to try it on: plain "
                                                 "lines, or JSON lines with text or messages.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What asks for the same in words, 'Answer in French.' say, "
                                                    "beside which the trial shows what was made.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of splits and controls.")] = 0,
    description: Annotated[str, typer.Option(help="What it does, for people.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="Label; may be repeated.")] = None,
    offline: Annotated[str | None, typer.Option(metavar="MODEL", help="Load this model here instead of using a running "
                                                "server, and write the artifact to --output.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the artifact to this file.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the methods.")] = False,
    show_fields: Annotated[bool, typer.Option("--fields", help="List the fields of the method.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Make an artifact from data and store it in the library of a running server, with a report of its controls.

    Pairs of texts, labelled texts, word pairs or words, as the method wants them; matched stimuli (entries with a
    matched_control_id) are paired here.
    """
    fields: dict[str, Any] = {"seed": seed, "description": description, "tags": tag or [], "layers": layer or "all"}
    fields |= {field: value for field, value in (("site", site), ("op", op)) if value is not None}
    if token is not None:
        fields["token"] = int(token) if token.lstrip("-").isdigit() else token
    fields |= {field: json_or_text(text) for field, text in assigned(settings or (), "--set")}
    trial = {"effort": effort, "grader": json_or_text(grader) if grader else None, "instruction": instruction,
             "prompts": prompts_of(prompts, "--prompts") if prompts else None}
    trial = {field: value for field, value in trial.items() if value is not None}
    if trial:
        fields["trial"] = trial
    with _server(offline, url, key) as client:
        methods = client.extraction_methods()
        if show_list:
            out.print(method_table(methods))
            return
        chosen = find_method(methods, method)
        if show_fields:
            out.print(field_table(chosen))
            return
        if data is None or name is None:
            raise InvalidRequest("--data and --name are needed", param="--data" if data is None else "--name")
        fields["name"] = name
        # Methods without a trial take what whole answers must be, and what is asked for them, as fields of their own.
        answered = {"grader": "grader", "prompts": "questions"}
        if "trial" in fields and "trial" not in chosen.request["properties"] and set(trial) <= set(answered) and (
                "grader" in chosen.request["properties"]):
            fields |= {answered[field]: value for field, value in fields.pop("trial").items()}
        if target is not None and "target" in chosen.request["properties"]:
            fields["target"] = target
        read = {chosen.data: read_records(data, where=where or (), columns=column or ()),
                **{field: read_records(Path(path)) for field, path in assigned(also or (), "--also")}}
        fields |= {field: entries(records, chosen.request, field, target=target, prefix=prefix, suffix=suffix)
                   for field, records in read.items()}
        file = output if offline is None or output is not None else Path(f"{name}.safetensors")
        found = finish(client, client.start_extraction(method=chosen.name, **fields), file)
        if offline is None:
            out.print(stored_as(client, found.artifact))


def finish(client: Client, job: Job, output: Path | None) -> Extracted:
    """Wait for a job, print its report, and write the file if one is wanted."""
    done = finished(client, job, STAGES)
    found = Extracted.model_validate(done.result)
    out.print(rendered(found.report))
    if output is not None:
        output.write_bytes(client.download_artifact(found.artifact))
        out.print(f"wrote {output}")
    return found


def find_method(methods: Sequence[Method], name: str | None) -> Method:
    """By its name, with hyphens or underscores.

    Raises:
        InvalidRequest: there is none of that name.
    """
    wanted = "" if name is None else name.replace("-", "_")
    for method in methods:
        if method.name == wanted:
            return method
    known = [method.name for method in methods]
    close = difflib.get_close_matches(wanted, known, n=2)
    raise InvalidRequest("name a method" if name is None else f"there is no extraction method {name!r}", param="METHOD",
                         fix=f"Did you mean {' or '.join(close)}?" if close else f"Use one of {', '.join(known)}.")


def method_table(methods: Sequence[Method]) -> Table:
    table = Table("method", "makes", "from", box=None)
    for method in methods:
        table.add_row(method.name, method.summary, method.data)
    return table


def field_table(method: Method) -> Table:
    """What may be given by --set; the fields of one entry of the data stand below its name."""
    table = Table("field", "type", "default", "meaning", title=method.summary, box=None)
    _add_fields(table, method.request, method.request, "")
    return table


def _add_fields(table: Table, schema: Mapping[str, Any], whole: Mapping[str, Any], indent: str) -> None:
    for name, field in schema.get("properties", {}).items():
        default = "needed" if name in schema.get("required", []) else json.dumps(field.get("default"))
        table.add_row(f"{indent}{name}", _type(field), default, field.get("description", ""))
        inner = field.get("items", {}).get("$ref", "").rpartition("/")[2]
        if inner:
            _add_fields(table, whole["$defs"][inner], whole, f"{indent}  ")


def _type(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " | ".join(dict.fromkeys(_type(option) for option in field["anyOf"] if option.get("type") != "null"))
    return str(field.get("type", field.get("const", field.get("$ref", "any").rpartition("/")[2])))


@contextmanager
def _server(offline: str | None, url: str, key: str | None) -> Iterator[Client]:
    """The server named, or one in this process over a model loaded here."""
    if offline is None:
        with connect(url, key) as client:
            yield client
        return
    # Only this branch loads the model, and torch with it.
    from server.boot import build
    from server.cli.inprocess import running
    from server.observability.logs import configure_logging
    from vectors.scratch import ScratchFolder

    configure_logging("console")
    with ScratchFolder() as folder:
        made = settings_with_model(offline, data_dir=folder, host="127.0.0.1")
        own_key = made.api_key
        with running(build(made)) as own_url, connect(
                own_url, None if own_key is None else own_key.get_secret_value()) as client:
            yield client
