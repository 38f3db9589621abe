"""Whose names are: `team/calm` belongs to the tenant `team`; `shared/calm`, and names without a slash, are for all.

Names without a slash and `shared/` are the house's: every tenant reads them, and only the tenant `default` and
administrators change them (docs/decisions/0014-names-of-tenants.md). Every look-up of a name asks the reader of its
context, so a name of another tenant is looked for as little as one that does not exist.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_
from sqlalchemy.orm import InstrumentedAttribute

from steering.language.errors import InvalidRequest, Path
from steering.language.fields import PART_PATTERN

SHARED = "shared"
_PART = re.compile(PART_PATTERN.removesuffix("$"))
# The tenant of keys that name none, and of the key of the settings.
HOUSE = "default"


class ForeignName(InvalidRequest):
    """A name that is to be written belongs to another tenant, or to the house."""

    code = "foreign_name"


@dataclass(frozen=True)
class Reader:
    """Who asks. tenant: None for administrators and the server's own work, which see everything; "" sees only what is
    for all."""

    tenant: str | None = None

    def reads(self, name: str) -> bool:
        return self.tenant is None or space_of(name) in ("", SHARED, self.tenant)

    def writes(self, name: str) -> bool:
        space = space_of(name)
        return self.tenant is None or space == self.tenant or (self.tenant == HOUSE and space in ("", SHARED))

    def sees(self, tenant: str) -> bool:
        """Whether what a tenant made, a job say, is there for this one."""
        return self.tenant is None or self.tenant == tenant

    def readable(self, column: InstrumentedAttribute[str]) -> list[ColumnElement[bool]]:
        """Conditions on a column of names."""
        if self.tenant is None:
            return []
        mine = [column.startswith(f"{space}/", autoescape=True) for space in (SHARED, self.tenant) if space]
        return [or_(~column.contains("/"), *mine)]

    def check_writes(self, name: str, param: str | Path) -> None:
        """Raises ForeignName, which tells nothing of what exists."""
        if not self.writes(name):
            space = space_of(name)
            whose = f"names that begin with {space}/ are" if space else "names without a slash are"
            raise ForeignName(f"{name[:100]!r} cannot be written by the tenant {self.tenant!r}, because {whose} not "
                              "its own", param=param, fix=f"Begin the name with {self.tenant}/.")


EVERYTHING, FOR_ALL = Reader(None), Reader("")
READER: ContextVar[Reader] = ContextVar("reader", default=EVERYTHING)


@contextmanager
def reading(reader: Reader) -> Iterator[None]:
    """Look-ups in the body of the statement are those of `reader`."""
    token = READER.set(reader)
    try:
        yield
    finally:
        READER.reset(token)


def is_tenant(name: str) -> bool:
    """Whether a tenant can be called so. "shared" is what names for all begin with."""
    return bool(_PART.fullmatch(name)) and name != SHARED


def space_of(name: str) -> str:
    """The tenant that a name or a reference belongs to, "shared", or "" for a name without a slash."""
    space, slash, _ = name.partition("/")
    return space if slash else ""


def owner_of(name: str) -> str:
    """The tenant that a name counts for."""
    space = space_of(name)
    return HOUSE if space in ("", SHARED) else space


def owned(column: InstrumentedAttribute[str], tenant: str) -> ColumnElement[bool]:
    """The names that count for a tenant."""
    mine = column.startswith(f"{tenant}/", autoescape=True)
    if tenant != HOUSE:
        return mine
    return or_(~column.contains("/"), column.startswith(f"{SHARED}/", autoescape=True), mine)


def check_shown(names: Iterable[tuple[Path, str]], to: Reader, who: str) -> None:
    """Raises InvalidRequest where one of the names is not for everybody who will read or use what holds it, because it
    would fail for them, and tell them the name."""
    for field, name in names:
        if not to.reads(name):
            raise InvalidRequest(f"{name!r} can be read by the tenant {space_of(name)!r} alone, and not by {who}",
                                 param=field, fix=f"Store it as {SHARED}/{name.partition('/')[2]}, too, and name that.")
