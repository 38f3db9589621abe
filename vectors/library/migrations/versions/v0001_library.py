"""The library: named versions of artifacts and presets, aliases, settings."""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "named",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("collection", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_named")),
        sa.UniqueConstraint("collection", "name", name=op.f("uq_named_collection_name")),
    )
    op.create_table(
        "setting",
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_setting")),
    )
    op.create_table(
        "version",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("named_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["named_id"], ["named.id"], name=op.f("fk_version_named_id"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_version")),
        sa.UniqueConstraint("named_id", "number", name=op.f("uq_version_named_id_number")),
    )
    op.create_index(op.f("ix_version_named_id_digest"), "version", ["named_id", "digest"], unique=False)
    op.create_table(
        "alias",
        sa.Column("named_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(length=32), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["named_id"], ["named.id"], name=op.f("fk_alias_named_id"), ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_alias_version_id"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("named_id", "alias", name=op.f("pk_alias")),
    )
    op.create_index(op.f("ix_alias_version_id"), "alias", ["version_id"], unique=False)
    op.create_table(
        "artifact",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("blob", sa.String(length=64), nullable=False),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.Column("layers", sa.JSON(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("op", sa.String(length=32), nullable=False),
        sa.Column("site", sa.String(length=32), nullable=False),
        sa.Column("model_id", sa.String(length=256), nullable=True),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("card", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("document", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_artifact_version_id"),
                                ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_artifact")),
    )
    op.create_index(op.f("ix_artifact_blob"), "artifact", ["blob"], unique=False)
    op.create_table(
        "preset",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_preset_version_id"),
                                ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_preset")),
    )
    op.create_table(
        "preset_use",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("selector", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["preset.version_id"], name=op.f("fk_preset_use_version_id"),
                                ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("version_id", "name", "selector", name=op.f("pk_preset_use")),
    )
    op.create_index(op.f("ix_preset_use_name"), "preset_use", ["name"], unique=False)
    op.create_table(
        "tag",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("tag", sa.String(length=32), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["artifact.version_id"], name=op.f("fk_tag_version_id"),
                                ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("version_id", "tag", name=op.f("pk_tag")),
    )
    op.create_index(op.f("ix_tag_tag"), "tag", ["tag"], unique=False)
    # The row that writers of artifacts and the collector of orphaned blobs lock against each other.
    settings = sa.table("setting", sa.column("key", sa.String), sa.column("value", sa.JSON),
                        sa.column("updated_at", sa.DateTime(timezone=True)))
    op.bulk_insert(settings, [{"key": "blobs", "value": {}, "updated_at": datetime(2026, 1, 1, tzinfo=UTC)}])


def downgrade() -> None:
    op.drop_index(op.f("ix_tag_tag"), table_name="tag")
    op.drop_table("tag")
    op.drop_index(op.f("ix_preset_use_name"), table_name="preset_use")
    op.drop_table("preset_use")
    op.drop_table("preset")
    op.drop_index(op.f("ix_artifact_blob"), table_name="artifact")
    op.drop_table("artifact")
    op.drop_index(op.f("ix_alias_version_id"), table_name="alias")
    op.drop_table("alias")
    op.drop_index(op.f("ix_version_named_id_digest"), table_name="version")
    op.drop_table("version")
    op.drop_table("setting")
    op.drop_table("named")
