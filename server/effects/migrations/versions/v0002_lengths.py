"""Length of completions, and how likely the untouched model would have ended them by then."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("effect_minutes") as table:
        table.add_column(sa.Column("length", sa.Float(), nullable=True))
        table.add_column(sa.Column("base_ended", sa.Float(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("effect_minutes") as table:
        table.drop_column("base_ended")
        table.drop_column("length")
