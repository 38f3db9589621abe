"""Intervals of what was counted."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "intervals",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("start", sa.Integer(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_intervals")),
    )
    op.create_index(op.f("ix_intervals_start"), "intervals", ["start"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_intervals_start"), table_name="intervals")
    op.drop_table("intervals")
