"""Bytes of the document of each version, so that what the library holds is counted without reading it."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # In place: a copy of the table would take along, by their foreign keys, the rows that hang on it.
    op.add_column("version", sa.Column("nbytes", sa.BigInteger(), nullable=False, server_default="0"))
    version = sa.table("version", sa.column("id"), sa.column("nbytes"))
    for name, column in (("artifact", "document"), ("preset", "spec")):
        held = sa.table(name, sa.column("version_id"), sa.column(column))
        length = sa.select(sa.func.length(held.c[column])).where(held.c.version_id == version.c.id).scalar_subquery()
        op.execute(version.update().where(sa.exists().where(held.c.version_id == version.c.id)).values(nbytes=length))


def downgrade() -> None:
    op.drop_column("version", "nbytes")
