"""Lists in pages. A page ends with a cursor that names its last entry, so entries added meanwhile shift nothing."""

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, Select, tuple_
from sqlalchemy.orm import Session

from steering.language.errors import InvalidRequest
from vectors.library.tables import Listing

Order = Literal["name", "-name", "created", "-created"]
ORDERS: tuple[Order, ...] = get_args(Order)
MAX_LIMIT = 1000
# Stands in a cursor between a name and its model, and in neither.
BETWEEN = "\n"

Item = TypeVar("Item")
_CURSOR = TypeAdapter(tuple[Order, str | int])


@dataclass(frozen=True)
class Page(Generic[Item]):
    """`cursor` fetches the next page; None on the last one."""

    items: list[Item]
    cursor: str | None


def fetch(session: Session, statement: "Select[str, str, int, int]", order: str, limit: int, cursor: str | None, *,
          filtered: bool) -> Page[int]:
    """One page of `statement`, which selects from the listing the name, its model, its id and what belongs to it.

    Orders are by name, or by when the name was first used; neither ever changes for an entry. `filtered`: the statement
    leaves entries out, so that most of the listing may have to be read for a page.
    """
    if order not in ORDERS:
        raise InvalidRequest(f"unknown order {order[:40]!r}", param="order", fix=f"Use one of {', '.join(ORDERS)}.")
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequest(f"limit must be between 1 and {MAX_LIMIT}", param="limit")
    # Read in this order, a filtered listing would be looked up entry by entry; as a sum it is read through and sorted.
    first_used = Listing.named_id + 0 if filtered else Listing.named_id
    down, by_name = order.startswith("-"), order.endswith("name")
    keys: list[ColumnElement[Any]] = ([Listing.name.expression, Listing.model.expression] if by_name
                                      else [first_used.expression])
    if cursor is not None:
        after = _decode(cursor, order)
        at: list[Any] = list(after.partition(BETWEEN)[::2]) if isinstance(after, str) else [after]
        statement = statement.where(tuple_(*keys) < tuple_(*at) if down else tuple_(*keys) > tuple_(*at))
    statement = statement.order_by(*(key.desc() if down else key.asc() for key in keys)).limit(limit + 1)
    rows = session.execute(statement).all()
    if len(rows) <= limit:
        return Page([row[-1] for row in rows], None)
    name, model, named_id, _ = rows[limit - 1]
    return Page([row[-1] for row in rows[:limit]], _encode(order, f"{name}{BETWEEN}{model}" if by_name else named_id))


def _encode(order: str, key: str | int) -> str:
    return base64.urlsafe_b64encode(_CURSOR.dump_json((order, key))).decode()  # type: ignore[arg-type]


def _decode(cursor: str, order: str) -> str | int:
    try:
        decoded, key = _CURSOR.validate_json(base64.b64decode(cursor.encode("ascii"), b"-_", validate=True),
                                             strict=True)
    except (ValidationError, binascii.Error, UnicodeEncodeError) as error:
        raise InvalidRequest("this is no cursor of this list", param="cursor", fix="Leave it out to start.") from error
    if decoded != order or isinstance(key, str) != order.endswith("name") or (
            isinstance(key, int) and abs(key) >= 2**63):
        raise InvalidRequest(f"this cursor belongs to the order {decoded}", param="cursor",
                             fix="Keep the order while paging.")
    return key
