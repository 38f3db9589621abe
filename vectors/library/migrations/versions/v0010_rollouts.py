"""Roll-outs and what their guard rails have seen."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "rollout",
        sa.Column("id", sa.String(24), nullable=False),
        sa.Column("named_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(32), nullable=False),
        sa.Column("stable", sa.Integer(), nullable=False),
        sa.Column("candidate", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("step_since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("terms", sa.Text(), nullable=False),
        sa.Column("history", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["named_id"], ["named.id"], name="fk_rollout_named_id", ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("id", name="pk_rollout"))
    for column in ("named_id", "status", "created_at"):
        op.create_index(f"ix_rollout_{column}", "rollout", [column])
    op.create_table(
        "rollout_tally",
        sa.Column("rollout_id", sa.String(24), nullable=False),
        sa.Column("rail", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("stable_count", sa.BigInteger(), nullable=False),
        sa.Column("stable_sum", sa.Double(), nullable=False),
        sa.Column("candidate_count", sa.BigInteger(), nullable=False),
        sa.Column("candidate_sum", sa.Double(), nullable=False),
        sa.Column("rounds", sa.BigInteger(), nullable=False),
        sa.Column("wealth", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollout.id"], name="fk_rollout_tally_rollout_id",
                                ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("rollout_id", "rail", name="pk_rollout_tally"))


def downgrade() -> None:
    op.drop_table("rollout_tally")
    op.drop_table("rollout")
