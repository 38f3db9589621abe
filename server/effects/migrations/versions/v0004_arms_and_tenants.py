"""Whose the completions are, and rows for the arms of roll-outs that they belong to."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = ("effect_minutes", "outcome_minutes")
# Names that begin so are for all.
SHARED = "shared"


def upgrade() -> None:
    for name in TABLES:
        with op.batch_alter_table(name) as table:
            table.add_column(sa.Column("tenant", sa.String(length=64), nullable=True))
            table.add_column(sa.Column("rollout", sa.String(length=32), nullable=False, server_default=""))
            table.add_column(sa.Column("arm", sa.String(length=16), nullable=False, server_default=""))
        for column in ("tenant", "rollout"):
            op.create_index(op.f(f"ix_{name}_{column}"), name, [column], unique=False)
        _name_tenants(name)


def _name_tenants(name: str) -> None:
    """Only requests of a tenant could use a name that begins with it, so such a name tells whose a row is."""
    rows = sa.table(name, *(sa.column(each, sa.String) for each in ("artifact", "preset", "tenant")))
    connection = op.get_bind()
    for artifact, preset in connection.execute(sa.select(rows.c.artifact, rows.c.preset).distinct()).all():
        spaces = [space for space, slash, _ in (artifact.partition("/"), preset.partition("/"))
                  if slash and space != SHARED]
        if spaces:
            connection.execute(sa.update(rows).where(rows.c.artifact == artifact, rows.c.preset == preset)
                               .values(tenant=spaces[0]))


def downgrade() -> None:
    for name in TABLES:
        # The version before would count these completions a second time.
        op.execute(sa.text(f"DELETE FROM {name} WHERE rollout <> ''"))
        for column in ("rollout", "tenant"):
            op.drop_index(op.f(f"ix_{name}_{column}"), table_name=name)
        with op.batch_alter_table(name) as table:
            for column in ("arm", "rollout", "tenant"):
                table.drop_column(column)
