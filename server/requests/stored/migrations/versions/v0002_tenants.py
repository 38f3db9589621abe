"""Whose a stored response is. Those that there are belong to the tenant of keys that name none."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("responses", sa.Column("tenant", sa.String(length=64), nullable=False, server_default="default"))


def downgrade() -> None:
    op.drop_column("responses", "tenant")
