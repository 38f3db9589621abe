"""Intervals in a database of their own: written in the background, lost without harm, out of the library's way.

Minutes of the last two days are kept as they are; what is older is kept by the hour, because nobody looks at a minute
of last week and a month of minutes would be slow to read.
"""

from pathlib import Path

from sqlalchemy import Integer, Text, delete, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from server.history.interval import Interval, buckets
from steering.language.errors import TrimtabError
from vectors.library.beside import Beside, metadata

MINUTE_S, HOUR_S = 60, 3600
MINUTES_KEPT_S = 48 * HOUR_S
MIGRATIONS = Path(__file__).parent / "migrations"


class HistoryUnavailable(TrimtabError):
    """The database of what was counted cannot be used. Requests do not need it."""

    code = "history_unavailable"


class Base(DeclarativeBase):
    metadata = metadata()


class Row(Base):
    """One interval of one server. start: seconds since 1970. width: seconds, a minute's or an hour's."""

    __tablename__ = "intervals"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    start: Mapped[int] = mapped_column(Integer, index=True)
    width: Mapped[int] = mapped_column(Integer)
    document: Mapped[str] = mapped_column(Text)


class HistoryStore:
    """Written in the background. Methods raise HistoryUnavailable for whatever the database complains about."""

    def __init__(self, url: str, *, kept_s: float) -> None:
        """kept_s: how long intervals are kept."""
        self._beside = Beside(url, "history", MIGRATIONS, lambda error: HistoryUnavailable(
            f"the database of the history cannot be used: {error}"[:400]))
        self._session = self._beside.session
        self._kept_s = kept_s

    def close(self) -> None:
        self._beside.close()

    def write(self, start: int, interval: Interval) -> None:
        """Add a minute. Raises HistoryUnavailable."""
        with self._session() as session:
            session.add(Row(start=start, width=MINUTE_S, document=interval.to_json()))

    def read(self, since: int, until: int) -> list[tuple[int, Interval]]:
        """Start and interval of all that begin in [since, until), oldest first. Raises HistoryUnavailable."""
        with self._session() as session:
            rows = session.execute(select(Row.start, Row.document).where(Row.start >= since, Row.start < until)
                                   .order_by(Row.start)).all()
        return [(start, Interval.from_json(document)) for start, document in rows]

    def tidy(self, now: int) -> None:
        """Make hours of old minutes, and delete what is kept no longer. Raises HistoryUnavailable."""
        whole = now - MINUTES_KEPT_S
        whole -= whole % HOUR_S
        with self._session() as session:
            session.execute(delete(Row).where(Row.start < now - self._kept_s))
            # Deleted and read in one: of several servers that tidy at once, one gets each row.
            old = session.execute(delete(Row).where(Row.start < whole, Row.width == MINUTE_S)
                                  .returning(Row.start, Row.document)).all()
            hours = buckets(((start, Interval.from_json(document)) for start, document in old), HOUR_S)
            session.add_all(Row(start=start, width=HOUR_S, document=interval.to_json())
                            for start, interval in hours.items())
