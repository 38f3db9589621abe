"""What lists and searches read: one row for each name, of what the bare name means now.

The rows are kept by the transactions that change what they tell of, so that a page of a hundred thousand names is one
scan of one narrow table, and mostly the beginning of one.
"""

from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from vectors.library import naming
from vectors.library.tables import ArtifactRow, Collection, Listing, Named, PresetRow

# Stands before and behind each tag. No tag can contain it.
MARK = "\n"


def relist(session: Session, named: Named) -> None:
    """Bring the row of a name in line with its versions and aliases. Call it after every change of them."""
    session.flush()
    collection, name = named.collection, named.name
    version_id = session.scalar(select(naming.current_version()).select_from(Named).where(Named.id == named.id))
    row = session.get(Listing, (collection, name, named.model))
    if version_id is None:
        if row is not None:
            session.delete(row)
        return
    told = {"named_id": named.id, "version_id": version_id, **_told(session, collection, name, version_id)}
    if row is None:
        session.add(Listing(collection=collection, name=name, model=named.model, **told))
        return
    for column, value in told.items():
        setattr(row, column, value)


def has_tag(tag: str) -> ColumnElement[bool]:
    return Listing.tags.contains(f"{MARK}{tag}{MARK}", autoescape=True)


def holds(text: str) -> ColumnElement[bool]:
    """Whether a name, its description or one of its tags holds a text, whatever their case."""
    return Listing.text.contains(text.lower(), autoescape=True)


def told_of_artifact(name: str, row: Any, tags: list[str]) -> dict[str, Any]:
    return {"kind": row.kind, "op": row.op, "site": row.site, "model_id": row.model_id,
            "tags": MARK + "".join(tag + MARK for tag in tags) if tags else "",
            "text": MARK.join([name, row.description, *tags]).lower()}


def told_of_preset(name: str, row: Any) -> dict[str, Any]:
    return {"tags": "", "text": MARK.join([name, row.description]).lower()}


def _told(session: Session, collection: Collection, name: str, version_id: int) -> dict[str, Any]:
    if collection == "preset":
        return told_of_preset(name, session.get_one(PresetRow, version_id))
    row = session.get_one(ArtifactRow, version_id)
    session.refresh(row, ["tags"])
    return told_of_artifact(name, row, [tag.tag for tag in row.tags])
