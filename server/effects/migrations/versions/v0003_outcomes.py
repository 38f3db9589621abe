"""What graded answers were."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "outcome_minutes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("minute", sa.Integer(), nullable=False),
        sa.Column("artifact", sa.String(length=128), nullable=False),
        sa.Column("preset", sa.String(length=128), nullable=False),
        sa.Column("grader", sa.String(length=64), nullable=False),
        sa.Column("outcome", sa.String(length=64), nullable=False),
        sa.Column("answers", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outcome_minutes")),
    )
    for column in ("minute", "artifact", "preset"):
        op.create_index(op.f(f"ix_outcome_minutes_{column}"), "outcome_minutes", [column], unique=False)


def downgrade() -> None:
    for column in ("preset", "artifact", "minute"):
        op.drop_index(op.f(f"ix_outcome_minutes_{column}"), table_name="outcome_minutes")
    op.drop_table("outcome_minutes")
