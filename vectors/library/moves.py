"""What has to hold before an alias moves or goes, and before a version goes that a roll-out tries."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from steering.language.errors import Conflict
from vectors.library.tables import RolloutRow, Version

# A roll-out in this state acts on requests.
PUBLISHED = "published"


def running_on(session: Session, named_id: int, alias: str | None = None) -> Sequence[RolloutRow]:
    """Roll-outs that act on requests for this name; of one alias, or of all."""
    of_alias = [] if alias is None else [RolloutRow.alias == alias]
    return session.scalars(select(RolloutRow).where(
        RolloutRow.named_id == named_id, RolloutRow.status == PUBLISHED, *of_alias)).all()


def check_still(session: Session, named_id: int, alias: str) -> None:
    """Raises Conflict: a roll-out compares versions behind this alias, and would compare others if it moved."""
    for row in running_on(session, named_id, alias):
        raise Conflict(f"the roll-out {row.id} is at work behind {row.named.name}@{alias}", param="alias",
                       fix="Promote or return the roll-out first.")


def check_untried(session: Session, doomed: Sequence[Version]) -> None:
    """Raises Conflict: a roll-out that acts on requests needs one of these versions, whatever is forced."""
    for row in running_on(session, doomed[0].named_id):
        for version in doomed:
            if version.number in (row.stable, row.candidate):
                raise Conflict(f"the roll-out {row.id} needs {row.named.name}@{version.number}", param="version",
                               fix="Promote or return the roll-out first.")
