"""Evaluations of specs, found by the artifacts and presets they are of."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "evaluation",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("summary", sa.JSON(), nullable=False),
        sa.Column("report", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_evaluation"))
    op.create_index("ix_evaluation_created_at", "evaluation", ["created_at"])
    op.create_table(
        "evaluation_use",
        sa.Column("evaluation_id", sa.String(40), nullable=False),
        sa.Column("ref", sa.String(100), nullable=False),
        sa.ForeignKeyConstraint(["evaluation_id"], ["evaluation.id"], ondelete="CASCADE",
                                name="fk_evaluation_use_evaluation_id"),
        sa.PrimaryKeyConstraint("evaluation_id", "ref", name="pk_evaluation_use"))
    op.create_index("ix_evaluation_use_ref", "evaluation_use", ["ref"])


def downgrade() -> None:
    op.drop_table("evaluation_use")
    op.drop_table("evaluation")
