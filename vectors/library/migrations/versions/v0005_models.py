"""Names belong to models. What was made on several models under one name is taken apart, and keeps its numbers."""

import json
from collections import defaultdict

import sqlalchemy as sa
from alembic import op

from vectors.library.migrations.versions.v0004_listing import told_of

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
AT_ONCE = 500


def upgrade() -> None:
    with op.batch_alter_table("named") as batch:
        batch.add_column(sa.Column("model", sa.String(64), nullable=False, server_default=""))
        batch.drop_constraint("uq_named_collection_name", type_="unique")
        batch.create_unique_constraint("uq_named_collection_name_model", ["collection", "name", "model"])
    with op.batch_alter_table("named") as batch:
        batch.alter_column("model", server_default=None)
    connection = op.get_bind()
    made_on = _fingerprints(connection)
    _artifacts(connection, made_on)
    _presets(connection, made_on)
    op.drop_table("listing")
    _create_listing(sa.Column("model", sa.String(64), nullable=False))
    _fill(connection)


def downgrade() -> None:
    """Names of several models cannot be put together again: the first one of each is kept."""
    connection = op.get_bind()
    named = _tables(connection)["named"]
    first = sa.select(sa.func.min(named.c.id)).group_by(named.c.collection, named.c.name)
    connection.execute(named.update().where(named.c.id.not_in(first)).values(
        name=named.c.name + "." + sa.cast(named.c.id, sa.String)))
    with op.batch_alter_table("named") as batch:
        batch.drop_constraint("uq_named_collection_name_model", type_="unique")
        batch.create_unique_constraint("uq_named_collection_name", ["collection", "name"])
        batch.drop_column("model")
    op.drop_table("listing")
    _create_listing(None)


def _create_listing(model: "sa.Column[str] | None") -> None:
    op.create_table(
        "listing",
        sa.Column("collection", sa.String(16), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        *([] if model is None else [model]),
        sa.Column("named_id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(32)),
        sa.Column("op", sa.String(32)),
        sa.Column("site", sa.String(32)),
        sa.Column("model_id", sa.String(256)),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("collection", "name", *([] if model is None else ["model"]), name="pk_listing"),
        sqlite_with_rowid=False)
    op.create_index("ix_listing_collection_named_id", "listing", ["collection", "named_id"])


def _tables(connection: sa.Connection) -> dict[str, sa.Table]:
    tables = sa.MetaData()
    tables.reflect(connection, only=["named", "version", "alias", "artifact", "preset_use", "preset", "tag", "listing"])
    return dict(tables.tables)


def _fingerprints(connection: sa.Connection) -> dict[int, str]:
    """Of the model that each artifact version was made on, "" where it does not say."""
    artifact = _tables(connection)["artifact"]
    found = {}
    for row in connection.execute(sa.select(artifact.c.version_id, artifact.c.document)).yield_per(AT_ONCE):
        found[row.version_id] = json.loads(row.document).get("fingerprint") or ""
    return found


def _artifacts(connection: sa.Connection, made_on: dict[int, str]) -> None:
    """Give each name its model. Of several, the oldest version's stays with the name as it is, and versions that do
    not say belong with it."""
    tables = _tables(connection)
    named, version, alias = tables["named"], tables["version"], tables["alias"]
    versions: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for row in connection.execute(sa.select(version.c.id, version.c.named_id).order_by(version.c.number)):
        if row.id in made_on:
            versions[row.named_id].append((row.id, made_on[row.id]))
    names = {row.id: row for row in connection.execute(sa.select(named).where(named.c.collection == "artifact"))}
    for named_id, own in versions.items():
        first, *others = list(dict.fromkeys(model for _, model in own if model)) or [""]
        connection.execute(named.update().where(named.c.id == named_id).values(model=first))
        for model in others:
            row = names[named_id]
            new_id = connection.scalar(named.insert().values(
                collection="artifact", name=row.name, last_number=row.last_number, model=model).returning(named.c.id))
            moved = [version_id for version_id, of in own if of == model]
            connection.execute(version.update().where(version.c.id.in_(moved)).values(named_id=new_id))
            connection.execute(alias.update().where(alias.c.version_id.in_(moved)).values(named_id=new_id))


def _presets(connection: sa.Connection, made_on: dict[int, str]) -> None:
    """A preset belongs to the one model that all the artifacts were made on which it names, if there is one."""
    tables = _tables(connection)
    named, version, use = tables["named"], tables["version"], tables["preset_use"]
    models: dict[str, set[str]] = defaultdict(set)
    for row in connection.execute(sa.select(named.c.name, version.c.id).join(version, version.c.named_id == named.c.id)
                                  .where(named.c.collection == "artifact")):
        models[row.name].add(made_on.get(row.id, ""))
    of_preset: dict[int, set[str]] = defaultdict(set)
    for row in connection.execute(sa.select(version.c.named_id, use.c.name)
                                  .join(version, version.c.id == use.c.version_id)):
        of_preset[row.named_id] |= models[row.name] - {""}
    for named_id, found in of_preset.items():
        if len(found) == 1:
            connection.execute(named.update().where(named.c.id == named_id).values(model=found.pop()))


def _fill(connection: sa.Connection) -> None:
    """From what bare names mean: the alias "production" where one is set, else the newest version."""
    tables = _tables(connection)
    named, version, alias, listing = tables["named"], tables["version"], tables["alias"], tables["listing"]
    newest = version.alias()
    by_alias = sa.select(alias.c.version_id).where(alias.c.named_id == named.c.id, alias.c.alias == "production")
    by_number = (sa.select(newest.c.id).where(newest.c.named_id == named.c.id).order_by(newest.c.number.desc())
                 .limit(1))
    means = sa.func.coalesce(by_alias.scalar_subquery(), by_number.scalar_subquery())
    last = 0
    while rows := connection.execute(sa.select(named, means.label("version_id")).where(named.c.id > last)
                                     .order_by(named.c.id).limit(AT_ONCE)).all():
        last = rows[-1].id
        there = [row for row in rows if row.version_id is not None]
        told = told_of(connection, listing.metadata, [row.version_id for row in there])
        listed = [{"collection": row.collection, "name": row.name, "model": row.model, "named_id": row.id,
                   "version_id": row.version_id, **told[row.version_id],
                   "text": f"{row.name}\n{told[row.version_id]['text']}".lower()} for row in there]
        if listed:
            connection.execute(listing.insert(), listed)
