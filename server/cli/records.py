"""A user's data file as records: JSON, JSON lines, CSV, TSV, or plain text with one entry a line."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.cli.given import assigned
from steering.language.errors import InvalidRequest

DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMS = "Give a JSON list, JSON lines, CSV or TSV with a header, or plain text (.txt) with one entry a line."


def read_records(path: Path, *, where: Sequence[str] = (), columns: Sequence[str] = ()) -> list[Any]:
    """Objects, or plain texts where the file is a list of those.

    where: conditions `COLUMN=VALUE`; of several on one column any, of several columns all must hold.
    columns: new names `FIELD=COLUMN` for columns.

    Raises:
        InvalidRequest: naming the line or the column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path.name} is no UTF-8 text", param="--data", fix=FORMS) from error
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", param="--data") from error
    records = _records(text, path)
    if not records:
        raise InvalidRequest(f"{path.name} holds nothing", param="--data", fix=FORMS)
    kept = [record for record in records if _holds(record, _conditions(where), path.name)]
    if not kept:
        raise InvalidRequest(f"no entry of {path.name} has {' and '.join(where)}", param="--where")
    return [_renamed(record, dict(assigned(columns, "--column")), path.name) for record in kept]


def _records(text: str, path: Path) -> list[Any]:
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=DELIMITERS[suffix], strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise InvalidRequest(f"{path.name} line {reader.line_num} is no CSV: {error}", param="--data") from error
        for number, row in enumerate(rows, 2):
            if None in row or None in row.values():
                raise InvalidRequest(f"{path.name} line {number} has another number of columns than the header",
                                     param="--data")
        # An empty cell is a value that is not given.
        return [{name: value for name, value in row.items() if value != ""} for row in rows]
    if suffix == ".txt":
        return [line for line in text.splitlines() if line.strip()]
    if text.lstrip().startswith("["):
        found = _parsed(text, path.name)
        return found if isinstance(found, list) else []
    _refuse_object(text, path.name)
    return [_parsed(line, f"{path.name} line {number}") for number, line in enumerate(text.splitlines(), 1)
            if line.strip()]


def _refuse_object(text: str, name: str) -> None:
    """Refuse one JSON object where a list is wanted; an object a line is JSON lines."""
    try:
        whole = json.loads(text)
    except ValueError:
        return
    if not isinstance(whole, dict):
        return
    lists = [key for key, value in whole.items()
             if isinstance(value, list) and any(isinstance(item, dict) for item in value)]
    if lists or len(text.strip().splitlines()) > 1:
        inside = f"Give the list under {lists[0][:40]!r} alone, as" if lists else "Write it as"
        raise InvalidRequest(f"{name} holds one JSON object where a list of entries is wanted", param="--data",
                             fix=f"{inside} [{{...}}, ...] or one object a line.")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{where} is no JSON: {error}", param="--data", fix=FORMS) from error


def _conditions(where: Sequence[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, value in assigned(where, "--where"):
        found.setdefault(name, set()).add(value)
    return found


def _holds(record: Any, conditions: Mapping[str, set[str]], name: str) -> bool:
    if not conditions:
        return True
    if not isinstance(record, dict):
        raise InvalidRequest(f"the entries of {name} have no columns", param="--where")
    for column in conditions.keys() - record.keys():
        raise InvalidRequest(f"an entry of {name} has no {column}; it has {', '.join(sorted(record))}", param="--where")
    return all(_written(record[column]) in values for column, values in conditions.items())


def _written(value: Any) -> str:
    """As a person would type it: texts as they are, true, 3 and null as in JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _renamed(record: Any, columns: Mapping[str, str], name: str) -> Any:
    if not columns:
        return record
    if not isinstance(record, dict):
        raise InvalidRequest(f"the entries of {name} have no columns", param="--column")
    for column in set(columns.values()) - record.keys():
        raise InvalidRequest(f"an entry of {name} has no {column}; it has {', '.join(sorted(record))}",
                             param="--column")
    return {**record, **{field: record[column] for field, column in columns.items()}}
