"""Names, versions and aliases, as artifacts and presets share them.

`name` means its alias `production` where one is set, else the newest version; `name@3` that version; `name@latest` the
newest one; `name@alias` what the alias points at.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, ScalarSelect, delete, exists, func, select
from sqlalchemy.orm import Session, aliased

from steering.language.errors import InvalidRequest, NotFound, Path
from steering.language.fields import LONGEST_NAME, NAME_PATTERN, REF_PATTERN
from vectors.library.spaces import READER
from vectors.library.tables import Alias, Collection, Listing, Named, Version

DEFAULT_ALIAS = "production"
# Means the newest version and can therefore not be set.
NEWEST = "latest"
MAX_QUERY = 256
# Names that one that does not exist is compared with.
MOST_COMPARED = 2000
_REF = re.compile(REF_PATTERN.removesuffix("$"))
_NAME = re.compile(NAME_PATTERN.removesuffix("$"))
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,31}")
# What stands behind a name in addresses (/v1/artifacts/calm/versions), and would be taken for that behind a slash.
RESERVED = re.compile(r"aliases|calibrate|calibration(?:\.[^/]*)?|download|port|trial\.[^/]*|tune|versions")


@dataclass(frozen=True)
class Ref:
    """A reference taken apart; `selector` is "" for a bare name."""

    name: str
    selector: str

    @classmethod
    def parse(cls, text: str, param: str | Path) -> "Ref":
        if not _REF.fullmatch(text):
            raise InvalidRequest(f"{text[:100]!r} is no reference", param=param,
                                 fix='Write "name", "name@3" or "name@alias".')
        name, _, selector = text.partition("@")
        return cls(name, selector)

    @property
    def number(self) -> int | None:
        return int(self.selector) if self.selector.isdigit() else None


def check_name(name: str, param: str) -> str:
    if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise InvalidRequest(f"{name[:100]!r} is no name", param=param, fix="Use lower case letters, digits, dot, "
                             "underscore and hyphen, at most 64, and one slash behind the tenant that it belongs to.")
    return name


def check_written(name: str, param: str | Path) -> None:
    """A name that something is to be stored under.

    Raises:
        InvalidRequest: it cannot be one. ForeignName: it is not the reader's to write.
    """
    check_name(name, str(param))
    if RESERVED.fullmatch(name.partition("/")[2]):
        raise InvalidRequest(f"{name!r} cannot be a name, because addresses have this behind one", param=param,
                             fix="Choose another.")
    READER.get().check_writes(name, param)


def check_changed(name: str, param: str | Path) -> None:
    """A name that is there and is to be changed; one that cannot be seen is left to the look-up, which finds none.

    Raises:
        ForeignName: it is not the reader's to write.
    """
    if READER.get().reads(name):
        READER.get().check_writes(name, param)


def check_alias(alias: str) -> str:
    if not _ALIAS.fullmatch(alias) or alias == NEWEST:
        raise InvalidRequest(f"{alias[:100]!r} cannot be an alias", param="alias",
                             fix=f"Use lower case letters, digits, dot, underscore and hyphen, a letter first, at most "
                                 f"32; {NEWEST} always means the newest version.")
    return alias


def searchable(text: str, param: str) -> str:
    if len(text) > MAX_QUERY or not text.isprintable():
        raise InvalidRequest(f"{param} must be printable and at most {MAX_QUERY} characters", param=param)
    return text


def take_name(session: Session, collection: Collection, name: str, model: str) -> Named:
    """The row of a model's name, made if it is new, and locked against other writers. A name that belongs to no model
    is everybody's, and is gone on with."""
    named = find_own(session, collection, name, model, lock=True)
    if named is None:
        named = Named(collection=collection, name=name, model=model, last_number=0)
        session.add(named)
        session.flush()
    return named


def add_version(session: Session, named: Named, digest: str, nbytes: int) -> Version:
    """The next version of a locked name. nbytes: of its document."""
    named.last_number += 1
    version = Version(named=named, number=named.last_number, digest=digest, nbytes=nbytes)
    session.add(version)
    session.flush()
    return version


def has_versions(session: Session, named: Named) -> bool:
    return bool(session.scalar(select(exists().where(Version.named_id == named.id))))


def same_content(session: Session, named: Named, digest: str) -> Version | None:
    return session.scalars(select(Version).where(Version.named_id == named.id, Version.digest == digest)
                           .order_by(Version.number).limit(1)).first()


def versions(session: Session, collection: Collection, name: str, *, lock: bool = False) -> list[Version]:
    """All versions, newest first.

    Raises:
        NotFound: there is none.
    """
    named = find_name(session, collection, name, lock)
    found = [] if named is None else session.scalars(
        select(Version).where(Version.named_id == named.id).order_by(Version.number.desc())).all()
    if not found:
        raise NotFound(f"there is no {collection} named {name!r}", param=collection,
                       fix=_near(session, collection, name))
    return list(found)


def resolve(session: Session, collection: Collection, ref: Ref, *, lock: bool = False) -> Version:
    """The version that `ref` means.

    Raises:
        NotFound: no such name, version or alias.
    """
    named = find_name(session, collection, ref.name, lock)
    version = None if named is None else session.get(Version, _select(session, named, ref) or 0)
    if version is None:
        known = f"{ref.name}@{ref.selector}" if ref.selector else ref.name
        fix = _near(session, collection, ref.name) if named is None or not has_versions(session, named) else (
            _selectors(session, named))
        raise NotFound(f"there is no {collection} {known!r}", param=collection, fix=fix)
    return version


def _near(session: Session, collection: Collection, name: str) -> str | None:
    """The names that may have been meant, those of the served model first."""
    served = session.info.get("model", "")
    rows = session.execute(
        select(Named.name, Named.model).where(Named.collection == collection, *READER.get().readable(Named.name),
                                              exists().where(Version.named_id == Named.id))
        .order_by(Named.model.not_in({served, ""}), Named.name).limit(MOST_COMPARED)).all()
    fitting = [known for known, model in rows if model in (served, "")]
    for known in (fitting, [other for other, _ in rows]):
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        if close:
            return f"Did you mean {' or '.join(dict.fromkeys(close))}?"
    return None


def _selectors(session: Session, named: Named) -> str:
    """The versions and aliases that a name has, the newest ones."""
    numbers = session.scalars(select(Version.number).where(Version.named_id == named.id)
                              .order_by(Version.number.desc()).limit(5)).all()
    others = session.scalars(select(Alias.alias).where(Alias.named_id == named.id).order_by(Alias.alias).limit(5)).all()
    return f"There is {', '.join(f'{named.name}@{one}' for one in [*numbers, *others])}."


def current_version() -> ScalarSelect[int | None]:
    """What a bare name means, as a correlated subquery on `Named`."""
    newest = aliased(Version)
    by_alias = select(Alias.version_id).where(Alias.named_id == Named.id, Alias.alias == DEFAULT_ALIAS)
    by_number = select(newest.id).where(newest.named_id == Named.id).order_by(newest.number.desc()).limit(1)
    return select(func.coalesce(by_alias.correlate(Named).scalar_subquery(),
                                by_number.correlate(Named).scalar_subquery())).correlate(Named).scalar_subquery()


def aliases_of(session: Session, version_ids: Iterable[int]) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for alias in session.scalars(select(Alias).where(Alias.version_id.in_(list(version_ids))).order_by(Alias.alias)):
        found[alias.version_id] = (*found.get(alias.version_id, ()), alias.alias)
    return found


def set_alias(session: Session, collection: Collection, name: str, alias: str, number: int) -> Version:
    """Point `alias` at a version, moving it if it pointed elsewhere."""
    if not 0 < number < 10**9:
        raise NotFound(f"there is no {collection} {name}@{number}", param="version")
    version = resolve(session, collection, Ref(name, str(number)), lock=True)
    row = session.get(Alias, (version.named_id, alias))
    if row is None:
        session.add(Alias(named_id=version.named_id, alias=alias, version_id=version.id))
    else:
        row.version_id = version.id
    session.flush()
    return version


def remove_alias(session: Session, collection: Collection, name: str, alias: str) -> Named:
    """The name that it was of."""
    named = find_name(session, collection, name, lock=True)
    row = None if named is None else session.get(Alias, (named.id, alias))
    if named is None or row is None:
        raise NotFound(f"there is no {collection} alias {name}@{alias}", param="alias")
    session.delete(row)
    return named


def aliased_number(session: Session, collection: Collection, name: str, alias: str) -> int | None:
    """The number of the version that an alias points at, None where there is no such alias."""
    named = find_name(session, collection, name)
    return None if named is None else session.scalar(
        select(Version.number).join(Alias, Alias.version_id == Version.id)
        .where(Alias.named_id == named.id, Alias.alias == alias))


def drop_aliases(session: Session, version_ids: Iterable[int]) -> None:
    session.execute(delete(Alias).where(Alias.version_id.in_(list(version_ids))))


def find_name(session: Session, collection: Collection, name: str, lock: bool = False) -> Named | None:
    """The row that a name means: of the model that is served, else of no model in particular, else of another one. A
    row that has no versions any more comes last. None for a name that the reader must not know of."""
    if not READER.get().reads(name):
        return None
    served = session.info.get("model", "")
    empty = ~exists().where(Version.named_id == Named.id)
    statement = select(Named).where(Named.collection == collection, Named.name == name).order_by(
        empty, Named.model != served, Named.model != "", Named.id).limit(1)
    return session.scalars(statement.with_for_update() if lock else statement).first()


def find_own(session: Session, collection: Collection, name: str, model: str, lock: bool = False) -> Named | None:
    """The row of the name that a new version for this model belongs to, if there is one."""
    statement = select(Named).where(Named.collection == collection, Named.name == name,
                                    Named.model.in_({model, ""})).order_by(Named.model != model).limit(1)
    return session.scalars(statement.with_for_update() if lock else statement).first()


def fits_model(model: str) -> ColumnElement[bool]:
    """Of the listing: names of this model, and of none in particular."""
    return Listing.model.in_({model, ""})


def _select(session: Session, named: Named, ref: Ref) -> int | None:
    if ref.selector == "":
        return session.scalar(select(current_version()).select_from(Named).where(Named.id == named.id))
    mine = select(Version.id).where(Version.named_id == named.id)
    if ref.number is not None:
        return session.scalar(mine.where(Version.number == ref.number))
    if ref.selector == NEWEST:
        return session.scalar(mine.order_by(Version.number.desc()).limit(1))
    return session.scalar(select(Alias.version_id).where(Alias.named_id == named.id, Alias.alias == ref.selector))
