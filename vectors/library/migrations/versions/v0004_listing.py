"""One row for each name, which lists and searches read; and the number that every change of the library raises."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
AT_ONCE = 500


def upgrade() -> None:
    op.create_table(
        "revision",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_revision"))
    op.execute(sa.table("revision", sa.column("id"), sa.column("number")).insert().values(id=1, number=1))
    op.create_table(
        "listing",
        sa.Column("collection", sa.String(16), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("named_id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(32)),
        sa.Column("op", sa.String(32)),
        sa.Column("site", sa.String(32)),
        sa.Column("model_id", sa.String(256)),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("collection", "name", name="pk_listing"),
        sqlite_with_rowid=False)
    op.create_index("ix_listing_collection_named_id", "listing", ["collection", "named_id"])
    _fill(op.get_bind())


def downgrade() -> None:
    op.drop_table("listing")
    op.drop_table("revision")


def _fill(connection: sa.Connection) -> None:
    """From what bare names mean: the alias "production" where one is set, else the newest version."""
    tables = sa.MetaData()
    tables.reflect(connection, only=["named", "version", "alias", "artifact", "preset", "tag", "listing"])
    named, version, alias = tables.tables["named"], tables.tables["version"], tables.tables["alias"]
    newest = version.alias()
    by_alias = sa.select(alias.c.version_id).where(alias.c.named_id == named.c.id, alias.c.alias == "production")
    by_number = (sa.select(newest.c.id).where(newest.c.named_id == named.c.id).order_by(newest.c.number.desc())
                 .limit(1))
    means = sa.func.coalesce(by_alias.scalar_subquery(), by_number.scalar_subquery())
    last = 0
    while rows := connection.execute(sa.select(named.c.id, named.c.collection, named.c.name, means.label("version_id"))
                                     .where(named.c.id > last).order_by(named.c.id).limit(AT_ONCE)).all():
        last = rows[-1].id
        told = told_of(connection, tables, [row.version_id for row in rows if row.version_id is not None])
        listed = [{"collection": row.collection, "name": row.name, "named_id": row.id, "version_id": row.version_id,
                   **told[row.version_id], "text": f"{row.name}\n{told[row.version_id]['text']}".lower()}
                  for row in rows if row.version_id is not None]
        if listed:
            connection.execute(tables.tables["listing"].insert(), listed)


def told_of(connection: sa.Connection, tables: sa.MetaData, version_ids: list[int]) -> dict[int, dict[str, Any]]:
    """What the rows tell of each version; `text` without the name."""
    artifact, preset, tag = (tables.tables[name] for name in ("artifact", "preset", "tag"))
    tags: dict[int, list[str]] = {}
    for row in connection.execute(sa.select(tag.c.version_id, tag.c.tag).where(tag.c.version_id.in_(version_ids))
                                  .order_by(tag.c.position)):
        tags.setdefault(row.version_id, []).append(row.tag)
    nothing = {"kind": None, "op": None, "site": None, "model_id": None, "tags": ""}
    found = {row.version_id: {**nothing, "text": row.description} for row in connection.execute(
        sa.select(preset.c.version_id, preset.c.description).where(preset.c.version_id.in_(version_ids)))}
    for made in connection.execute(sa.select(
            artifact.c.version_id, artifact.c.kind, artifact.c.op, artifact.c.site, artifact.c.model_id,
            artifact.c.description).where(artifact.c.version_id.in_(version_ids))):
        own = tags.get(made.version_id, [])
        found[made.version_id] = {
            "kind": made.kind, "op": made.op, "site": made.site, "model_id": made.model_id,
            "tags": "\n" + "".join(f"{one}\n" for one in own) if own else "",
            "text": "\n".join([made.description, *own])}
    return found
