"""What aliases require of a version."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "alias_requirement",
        sa.Column("named_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(32), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["named_id"], ["named.id"], name="fk_alias_requirement_named_id", ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("named_id", "alias", name="pk_alias_requirement"))


def downgrade() -> None:
    op.drop_table("alias_requirement")
