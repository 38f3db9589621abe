"""Whose an evaluation is. Those that there are belong to the tenant of keys that name none."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("evaluation", sa.Column("tenant", sa.String(64), nullable=False, server_default="default"))
    op.create_index("ix_evaluation_tenant", "evaluation", ["tenant"])


def downgrade() -> None:
    op.drop_index("ix_evaluation_tenant", "evaluation")
    op.drop_column("evaluation", "tenant")
