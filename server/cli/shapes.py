"""From records as data sets have them to what an extraction method takes, as its JSON schema says.

Three shapes beside the method's own: labelled texts (`text`, `label`, `item`), of which pairs are made within an item;
matched stimuli (`text`, `emotion`, `matched_control_id`, as in AIPsy-Affect, Keeman 2026, arXiv 2604.23719), whose
entries are paired with their control; and for methods that take bare texts, any record with one text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from steering.language.errors import InvalidRequest

Record = Mapping[str, Any]
Schema = Mapping[str, Any]
# Prompts that data sets hold as conversations, too: rendered by the server with the template of its model.
CONVERSATIONS = {"positive": "positive_messages", "negative": "negative_messages", "text": "messages"}
TEXTS = ("text", "word", "token", "anchor")
# Fewer groups than this cannot be drawn into splits by the server, which splits by item (vectors.extract.data).
MIN_GROUPS = 10
NEUTRAL = "neutral"


def entries(records: Sequence[Any], request: Schema, field: str, *, target: str | None = None, prefix: str = "",
            suffix: str = "") -> list[Any]:
    """What the list field `field` of a method takes.

    request: the method's JSON schema. target: the label whose texts are the positive ones, where pairs are made here.
    prefix, suffix: put before and behind every plain text: a space before words, or what makes the end of a text the
    place where the model would go on (" He felt").

    Raises:
        InvalidRequest: naming the entry.
    """
    properties = request.get("properties", {})
    lists = {name: found for name, schema in properties.items()
             for found in schema.get("anyOf", [schema]) if found.get("type") == "array"}
    if field not in lists:
        raise InvalidRequest(f"{field} is no list of this method", param="--also",
                             fix=f"Its lists are {', '.join(lists)}.")
    item = _resolved(lists[field].get("items", {}), request)
    if "properties" not in item:
        return [f"{prefix}{_text(record, n)}{suffix}" for n, record in enumerate(records)]
    fields = item["properties"]
    for n, record in enumerate(records):
        if not isinstance(record, dict):
            raise InvalidRequest(f"entry {n} is no object", param="--data",
                                 fix=f"An entry has the fields {', '.join(fields)}.")
    if any("matched_control_id" in record for record in records):
        records = _pairs_of_stimuli(records, target) if "positive" in fields else _labelled_stimuli(records)
    elif "positive" in fields and not any("positive" in record or "positive_messages" in record for record in records):
        records = _pairs_of_labelled(records, target)
    return [_entry(record, n, item, prefix, suffix) for n, record in enumerate(records)]


def _resolved(schema: Schema, request: Schema) -> Schema:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Schema = request.get("$defs", {}).get(name, schema)
    return found


def _text(record: Any, number: int) -> str:
    if isinstance(record, str):
        return record
    for name in TEXTS:
        if isinstance(record, dict) and isinstance(record.get(name), str):
            return str(record[name])
    raise InvalidRequest(f"entry {number} is no text", param="--data",
                         fix=f"Give texts, or objects with one of {', '.join(TEXTS)} (--column text=COLUMN names it).")


def _entry(record: Record, number: int, item: Schema, prefix: str, suffix: str) -> dict[str, Any]:
    """The fields that the method knows; what else a data set records about an entry is left out."""
    found = {}
    for name, schema in item["properties"].items():
        value = record.get(CONVERSATIONS.get(name, name))
        if value is None:
            value = record.get(name)
        if value is None:
            continue
        if name in CONVERSATIONS and isinstance(value, str):
            value = f"{prefix}{value}{suffix}"
        found[name] = _fitting(value, schema)
    for name in item.get("required", []):
        if name not in found:
            raise InvalidRequest(f"entry {number} has no {name}; it has {', '.join(sorted(map(str, record)))}",
                                 param="--data", fix=f"Name the column: --column {name}=COLUMN.")
    return found


def _fitting(value: Any, schema: Schema) -> Any:
    """Numbers where texts are wanted (labels, items) and, from CSV, texts where numbers are."""
    kinds = {option.get("type") for option in schema.get("anyOf", [schema])}
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not kinds & {"integer", "number"}:
        return str(value)
    if isinstance(value, str) and "integer" in kinds and value.strip().lstrip("-").isdigit():
        return int(value)
    return value


def _pairs_of_labelled(records: Sequence[Record], target: str | None) -> list[Record]:
    """Each text of the target beside one of another label about the same item."""
    if not all("text" in record and "label" in record for record in records):
        raise InvalidRequest("the entries have neither positive and negative nor text and label", param="--data",
                             fix='Write {"positive": "...", "negative": "..."}, or name the columns: '
                                 "--column positive=COLUMN --column negative=COLUMN.")
    labels = sorted({str(record["label"]) for record in records})
    if target is None or target not in labels:
        raise InvalidRequest("which label is the positive one?", param="--target",
                             fix=f"Use one of {', '.join(labels[:20])}.")
    groups: dict[str, tuple[list[Record], list[Record]]] = {}
    for record in records:
        group = groups.setdefault(str(record.get("item")), ([], []))
        group[str(record["label"]) != target].append(record)
    pairs: list[Record] = []
    for positives, negatives in groups.values():
        for positive, negative in zip(positives, negatives, strict=False):
            pairs.append({"positive": positive["text"], "negative": negative["text"], "item": positive.get("item"),
                          "positive_messages": positive.get("messages"), "negative_messages": negative.get("messages"),
                          "split": positive.get("split")})
    if not pairs:
        raise InvalidRequest(f"no item has a text of {target} and one of another label", param="--data",
                             fix="Give both texts of a pair the same item: --column item=COLUMN.")
    return pairs


def _pairs_of_stimuli(records: Sequence[Record], target: str | None) -> list[Record]:
    """Each stimulus beside its control. All of one emotion and domain are one item: they share their vocabulary."""
    by_id = {record.get("id"): record for record in records}
    if len(by_id) < len(records):
        raise InvalidRequest("two stimuli have the same id", param="--data")
    emotions = sorted({str(record["emotion"]) for record in records if _stimulus(record)})
    if target is not None and target not in emotions:
        raise InvalidRequest(f"there is no emotion {target}", param="--target",
                             fix=f"Use one of {', '.join(emotions)}; leave it out for all of them.")
    pairs, used = [], set()
    for record in records:
        if not _stimulus(record) or target not in (None, record["emotion"]):
            continue
        control = by_id.get(record["matched_control_id"])
        if control is None or control.get("domain") != record.get("domain") or control["id"] in used:
            raise InvalidRequest(f"{record['id']} has no control of its own in the same domain", param="--data",
                                 fix="Give stimuli and controls in one file.")
        used.add(control["id"])
        pairs.append({"positive": record.get("text"), "negative": control.get("text"), "item": _group(record)})
    if not pairs:
        raise InvalidRequest("no stimulus has a control", param="--data", fix="Leave --where more open.")
    return _split(pairs)


def _labelled_stimuli(records: Sequence[Record]) -> list[Record]:
    by_id = {record.get("id"): record for record in records}
    found: list[Record] = []
    for record in records:
        control_of = by_id.get(record.get("matched_control_id"))
        group = _group(record) if _stimulus(record) else None if control_of is None else _group(control_of)
        found.append({"text": record.get("text"), "label": record.get("emotion"), "item": group})
    return found


def _stimulus(record: Record) -> bool:
    return record.get("matched_control_id") is not None and record.get("emotion") != NEUTRAL


def _group(record: Record) -> str:
    return f"{record.get('emotion')}:{record.get('domain')}"


def _split(pairs: list[dict[str, Any]]) -> list[Record]:
    """Splits by group where there are too few of them to draw: the last one is test, the one before it dev."""
    groups = sorted({pair["item"] for pair in pairs})
    if len(groups) >= MIN_GROUPS or len(groups) < 3:
        return list(pairs)
    place = {group: "test" if n == len(groups) - 1 else "dev" if n == len(groups) - 2 else "train"
             for n, group in enumerate(groups)}
    return [{**pair, "split": place[pair["item"]]} for pair in pairs]
