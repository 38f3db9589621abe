"""Minute rows of measured effects."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "effect_minutes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("minute", sa.Integer(), nullable=False),
        sa.Column("artifact", sa.String(length=128), nullable=False),
        sa.Column("op", sa.String(length=32), nullable=False),
        sa.Column("preset", sa.String(length=128), nullable=False),
        sa.Column("completions", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("kl_mean", sa.Float(), nullable=False),
        sa.Column("kl_p50", sa.Float(), nullable=False),
        sa.Column("kl_p95", sa.Float(), nullable=False),
        sa.Column("entropy_change", sa.Float(), nullable=False),
        sa.Column("top1_changed", sa.Float(), nullable=False),
        sa.Column("repetition", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_effect_minutes")),
    )
    for column in ("minute", "artifact", "preset"):
        op.create_index(op.f(f"ix_effect_minutes_{column}"), "effect_minutes", [column], unique=False)


def downgrade() -> None:
    for column in ("preset", "artifact", "minute"):
        op.drop_index(op.f(f"ix_effect_minutes_{column}"), table_name="effect_minutes")
    op.drop_table("effect_minutes")
