"""Evaluations that were made, in the library's database: newest first, found by the artifact or preset they are of."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from steering.language.errors import NotFound, PayloadTooLarge
from vectors.library.audit.notes import maker, note
from vectors.library.database import Database
from vectors.library.paging import MAX_LIMIT
from vectors.library.spaces import READER
from vectors.library.tables import EvaluationRow, EvaluationUse

# Of each tenant. The oldest go when there are more: an evaluation is evidence about a version, not the version.
KEPT = 2000
MAX_REPORT_BYTES = 8 * 2**20


class Evaluations:
    """Reports are JSON texts here; what stands in them is `vectors.evaluate.report.EvaluationReport`. Each is there for
    the tenant that made it, because it holds the tenant's prompts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, id: str, created_at: datetime, refs: Sequence[str], summary: dict[str, Any], report: str) -> None:
        """Store a report.

        Args:
            refs: artifacts and presets with their versions, `cheerful@3` say, by which it is found.

        Raises:
            PayloadTooLarge: it takes more than MAX_REPORT_BYTES.
        """
        if len(report) > MAX_REPORT_BYTES:
            raise PayloadTooLarge(f"the report takes more than {MAX_REPORT_BYTES} bytes", param="samples",
                                  fix="Keep fewer samples or draws.")

        tenant = maker()

        def work(session: Session) -> None:
            session.add(EvaluationRow(id=id, created_at=created_at, tenant=tenant, summary=summary, report=report,
                                      uses=[EvaluationUse(ref=ref) for ref in dict.fromkeys(refs)]))
            note(session, "evaluation.create", id, after={"refs": list(dict.fromkeys(refs))})
            session.flush()
            own = select(EvaluationRow.id).where(EvaluationRow.tenant == tenant)
            kept = set(session.scalars(own.order_by(EvaluationRow.created_at.desc(), EvaluationRow.id).limit(KEPT)))
            over = [one for one in session.scalars(own) if one not in kept]
            if over:
                session.execute(delete(EvaluationRow).where(EvaluationRow.id.in_(over)))

        self._database.write(work)

    def list(self, ref: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """Summaries, newest first; of one artifact or preset version where `ref` names it."""
        statement = select(EvaluationRow.summary).order_by(EvaluationRow.created_at.desc(), EvaluationRow.id)
        if (tenant := READER.get().tenant) is not None:
            statement = statement.where(EvaluationRow.tenant == tenant)
        if ref is not None:
            statement = statement.where(exists().where(EvaluationUse.evaluation_id == EvaluationRow.id,
                                                       EvaluationUse.ref == ref))
        with self._database.read() as session:
            return list(session.scalars(statement.limit(min(limit, MAX_LIMIT))))

    def report(self, id: str) -> Any:
        """The stored report, parsed. Raises NotFound."""
        with self._database.read() as session:
            row = _visible(session, id)
            return json.loads(row.report)

    def delete(self, id: str) -> None:
        """Raises NotFound."""
        def work(session: Session) -> None:
            row = _visible(session, id)
            session.delete(row)
            note(session, "evaluation.delete", id, before={"summary": row.summary})

        self._database.write(work)


def _visible(session: Session, id: str) -> EvaluationRow:
    """Raises NotFound: there is none, or it is another tenant's."""
    row = session.get(EvaluationRow, id)
    if row is None or not READER.get().sees(row.tenant):
        raise NotFound(f"there is no evaluation {id[:60]!r}", param="id")
    return row
