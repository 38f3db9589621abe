"""What an alias requires: a passed evaluation of a version, before the version may be moved there or rolled out.

The newest evaluation decides that is of exactly this version, on the model that is served, with enough prompts. So one
that failed is not outdone by an older one that passed, and a version that was evaluated with other artifacts than it
means now counts as not evaluated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from steering.language.errors import Conflict, InvalidRequest, NotFound
from vectors.library import naming
from vectors.library.audit.notes import note
from vectors.library.database import MODEL, Database
from vectors.library.naming import Ref
from vectors.library.spaces import READER
from vectors.library.tables import (
    Alias,
    AliasRequirement,
    Collection,
    EvaluationRow,
    EvaluationUse,
    Named,
    PresetUse,
    Version,
    now,
)
from vectors.storage_errors import LibraryFull

MOST_KEPT = 1000
# Newer evaluations of one version than this are looked through for one that counts.
MOST_LOOKED_AT = 100
# The dose at which the spec acts as it is stored.
AS_STORED = 1.0


class EvaluationRequired(InvalidRequest):
    """An alias requires a passed evaluation, and the version that is to be moved there has none."""

    code = "evaluation_required"


@dataclass(frozen=True)
class StoredRequirement:
    """document: JSON text of `bounds` (each with `figure`, `grader`, `at_least`, `at_most`), `prompts`, `max_age_s` and
    `tenant`."""

    collection: Collection
    name: str
    alias: str
    document: str
    updated_at: datetime


class Requirements:
    """Methods block: call them in a thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def list(self) -> list[StoredRequirement]:
        with self._database.read() as session:
            rows = session.execute(select(AliasRequirement, Named).join(Named).where(
                *READER.get().readable(Named.name)).order_by(Named.name, AliasRequirement.alias))
            return [_stored(row, named) for row, named in rows]

    def set(self, collection: Collection, name: str, alias: str, document: Mapping[str, Any]) -> StoredRequirement:
        """It holds for every move from now on; the version that the alias points at stays.

        Raises:
            NotFound: there is no such alias. LibraryFull: there are `MOST_KEPT` already.
        """
        _check(collection, name, alias)

        def work(session: Session) -> StoredRequirement:
            named = naming.find_name(session, collection, name, lock=True)
            if named is None or session.get(Alias, (named.id, alias)) is None:
                raise NotFound(f"there is no {collection} alias {name}@{alias}", param="target",
                               fix="Point the alias at the version that is in use first.")
            row = session.get(AliasRequirement, (named.id, alias))
            before = None if row is None else json.loads(row.document)
            if row is None:
                if len(session.scalars(select(AliasRequirement.alias).limit(MOST_KEPT)).all()) == MOST_KEPT:
                    raise LibraryFull(f"there are {MOST_KEPT} requirements already", fix="Delete some.")
                row = AliasRequirement(named_id=named.id, alias=alias)
                session.add(row)
            row.document, row.updated_at = json.dumps(document, sort_keys=True, allow_nan=False), now()
            session.flush()
            note(session, "requirement.set", f"{name}@{alias}", before=before, after=document)
            return _stored(row, named)

        return self._database.write(work)

    def delete(self, collection: Collection, name: str, alias: str) -> None:
        """Raises NotFound."""
        _check(collection, name, alias)

        def work(session: Session) -> None:
            named = naming.find_name(session, collection, name, lock=True)
            row = None if named is None else session.get(AliasRequirement, (named.id, alias))
            if row is None:
                raise NotFound(f"{name}@{alias} requires nothing", param="target")
            note(session, "requirement.delete", f"{name}@{alias}", before=json.loads(row.document))
            session.delete(row)

        self._database.write(work)


def check_passed(session: Session, version: Version, alias: str) -> None:
    """Raises EvaluationRequired: the alias requires an evaluation that this version has not passed."""
    row = session.get(AliasRequirement, (version.named_id, alias))
    if row is None:
        return
    wanted = json.loads(row.document)
    ref, target = f"{version.named.name}@{version.number}", f"{version.named.name}@{alias}"
    found = _newest(session, version, ref, wanted)
    if found is None:
        raise EvaluationRequired(
            f"{target} requires a passed evaluation, and {ref} has none on this model with {wanted['prompts']} "
            "prompts, as it is stored", param="version", fix="Evaluate that version, then move the alias.")
    for bound in wanted["bounds"]:
        value = figure_of(found, bound)
        told = bound["figure"] if bound.get("grader") is None else f"{bound['figure']} by {bound['grader']}"
        least, most = bound.get("at_least"), bound.get("at_most")
        if value is None:
            raise EvaluationRequired(f"{target} has a bound on {told}, and the evaluation {found['id']} of {ref} does "
                                     "not say it", param="version", fix="Evaluate it with that grader, at dose 1, and "
                                     "with draws where chance is bounded.")
        if (least is not None and value < least) or (most is not None and value > most):
            limit = f"at least {least:g}" if least is not None and value < least else f"at most {most:g}"
            raise EvaluationRequired(f"{target} requires {told} of {limit}, and the evaluation {found['id']} of {ref} "
                                     f"found {value:.4g}", param="version", fix="Make a better version.")


def check_required(session: Session, named_id: int, aliases: Sequence[str]) -> None:
    """Raises Conflict: one of these aliases is to go, and requires something, which nothing would then be held to."""
    for alias in aliases:
        if session.get(AliasRequirement, (named_id, alias)) is not None:
            raise Conflict(f"the alias {alias} requires a passed evaluation and cannot be taken away", param="alias",
                           fix="Move it to another version, or delete the requirement first.")


def figure_of(summary: Mapping[str, Any], bound: Mapping[str, Any]) -> float | None:
    """What an evaluation says of a bound's figure, of the spec as it is stored; None where it does not."""
    arm = next((one for one in summary["results"] if one["dose"] == AS_STORED), None)
    if arm is None:
        return None
    if bound["figure"] == "kl":
        return float(arm["kl"])
    if bound["grader"] not in summary["graders"]:
        return None
    values = arm[bound["figure"]]
    place = summary["graders"].index(bound["grader"])
    return float(values[place]) if place < len(values) else None


def _newest(session: Session, version: Version, ref: str, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    statement = select(EvaluationRow).where(
        exists().where(EvaluationUse.evaluation_id == EvaluationRow.id, EvaluationUse.ref == ref))
    if wanted.get("max_age_s") is not None:
        statement = statement.where(EvaluationRow.created_at >= now() - timedelta(seconds=wanted["max_age_s"]))
    if wanted.get("tenant") is not None:
        statement = statement.where(EvaluationRow.tenant == wanted["tenant"])
    served = session.info.get(MODEL, "")
    applied = _means(session, version)
    for row in session.scalars(statement.order_by(EvaluationRow.created_at.desc()).limit(MOST_LOOKED_AT)):
        summary = row.summary
        of_it = summary["preset"] == ref if version.named.collection == "preset" else summary["preset"] is None
        # Under a mandatory spec something else acted beside the version.
        if (of_it and not summary.get("mandatory") and set(summary["artifacts"]) == applied
                and summary["prompts"] >= wanted["prompts"]
                and (not served or summary["fingerprint"] == served)):
            return dict(summary)
    return None


def _means(session: Session, version: Version) -> set[str]:
    """The versions of artifacts that act where this one does."""
    if version.named.collection == "artifact":
        return {f"{version.named.name}@{version.number}"}
    found = set()
    for use in session.scalars(select(PresetUse).where(PresetUse.version_id == version.id)):
        meant = naming.resolve(session, "artifact", Ref(use.name, use.selector))
        found.add(f"{use.name}@{meant.number}")
    return found


def _check(collection: Collection, name: str, alias: str) -> None:
    naming.check_name(name, "target")
    naming.check_alias(alias)
    naming.check_changed(name, "target")


def _stored(row: AliasRequirement, named: Named) -> StoredRequirement:
    return StoredRequirement(named.collection, named.name, row.alias, row.document, row.updated_at)
