"""The tables. `vectors/library/migrations/` creates them; a test holds the two equal.

Artifacts and presets share names, versions and aliases: `named` is a name of one collection and the highest version
number it ever gave out (so that numbers are never used again), `version` is one immutable version of it.
"""

from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

Collection = Literal["artifact", "preset"]


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC, also on databases that drop the time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s", "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s"})


class Named(Base):
    """`model`: fingerprint of the model that the name belongs to; "" for a name of no model in particular. Several
    models may each have something of the same name."""

    __tablename__ = "named"
    __table_args__ = (UniqueConstraint("collection", "name", "model"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    collection: Mapped[Collection] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(64), default="")
    last_number: Mapped[int] = mapped_column(default=0)


class Version(Base):
    """`digest` identifies the content as created, numbers and metadata; equal content is not stored twice. `nbytes`:
    of its document, metadata or spec."""

    __tablename__ = "version"
    __table_args__ = (UniqueConstraint("named_id", "number"), Index(None, "named_id", "digest"))

    id: Mapped[int] = mapped_column(primary_key=True)
    named_id: Mapped[int] = mapped_column(ForeignKey("named.id", ondelete="RESTRICT"))
    number: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    nbytes: Mapped[int] = mapped_column(BigInteger, server_default="0")

    named: Mapped[Named] = relationship()


class Alias(Base):
    __tablename__ = "alias"

    named_id: Mapped[int] = mapped_column(ForeignKey("named.id", ondelete="RESTRICT"), primary_key=True)
    alias: Mapped[str] = mapped_column(String(32), primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("version.id", ondelete="RESTRICT"), index=True)


# In the column `op` of an artifact that is read and never applied.
NO_OP = "none"


class ArtifactRow(Base):
    """`document` is the metadata as created; description, tags and card beside it are what patches change."""

    __tablename__ = "artifact"

    version_id: Mapped[int] = mapped_column(ForeignKey("version.id", ondelete="CASCADE"), primary_key=True)
    blob: Mapped[str] = mapped_column(String(64), index=True)
    nbytes: Mapped[int] = mapped_column(BigInteger)
    layers: Mapped[list[int]] = mapped_column(JSON)
    kind: Mapped[str] = mapped_column(String(32))
    op: Mapped[str] = mapped_column(String(32))
    site: Mapped[str] = mapped_column(String(32))
    model_id: Mapped[str | None] = mapped_column(String(256))
    description: Mapped[str] = mapped_column(Text)
    card: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    document: Mapped[str] = mapped_column(Text)

    version: Mapped[Version] = relationship(lazy="joined", innerjoin=True)
    tags: Mapped[list["Tag"]] = relationship(lazy="selectin", order_by="Tag.position", cascade="all, delete-orphan",
                                             passive_deletes=True)


class Tag(Base):
    __tablename__ = "tag"

    version_id: Mapped[int] = mapped_column(ForeignKey("artifact.version_id", ondelete="CASCADE"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(32), primary_key=True, index=True)
    position: Mapped[int]


class PresetRow(Base):
    __tablename__ = "preset"

    version_id: Mapped[int] = mapped_column(ForeignKey("version.id", ondelete="CASCADE"), primary_key=True)
    description: Mapped[str] = mapped_column(Text)
    spec: Mapped[str] = mapped_column(Text)

    version: Mapped[Version] = relationship(lazy="joined", innerjoin=True)
    uses: Mapped[list["PresetUse"]] = relationship(cascade="all, delete-orphan", passive_deletes=True)


class PresetUse(Base):
    """A reference from a preset to an artifact, as written: selector is "" or what stands behind the @."""

    __tablename__ = "preset_use"

    version_id: Mapped[int] = mapped_column(ForeignKey("preset.version_id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True, index=True)
    selector: Mapped[str] = mapped_column(String(32), primary_key=True)


class EvaluationRow(Base):
    """What an evaluation measured: `summary` for lists, `report` as JSON text. `tenant`: who asked for it."""

    __tablename__ = "evaluation"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    tenant: Mapped[str] = mapped_column(String(64), server_default="default", index=True)
    summary: Mapped[dict[str, Any]] = mapped_column(JSON)
    report: Mapped[str] = mapped_column(Text)

    uses: Mapped[list["EvaluationUse"]] = relationship(cascade="all, delete-orphan", passive_deletes=True)


class EvaluationUse(Base):
    """An artifact or preset version that was evaluated, "cheerful@3". It may be deleted; the finding stays."""

    __tablename__ = "evaluation_use"

    evaluation_id: Mapped[str] = mapped_column(ForeignKey("evaluation.id", ondelete="CASCADE"), primary_key=True)
    ref: Mapped[str] = mapped_column(String(100), primary_key=True, index=True)


class Listing(Base):
    """What a list or a search reads of a name of one model: what its bare name means now. `tags`: each with a line
    break before and behind it. `text`: what is searched, in lower case."""

    __tablename__ = "listing"
    __table_args__ = (Index(None, "collection", "named_id"), {"sqlite_with_rowid": False})

    collection: Mapped[Collection] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    named_id: Mapped[int]
    version_id: Mapped[int]
    kind: Mapped[str | None] = mapped_column(String(32))
    op: Mapped[str | None] = mapped_column(String(32))
    site: Mapped[str | None] = mapped_column(String(32))
    model_id: Mapped[str | None] = mapped_column(String(256))
    tags: Mapped[str] = mapped_column(Text)
    text: Mapped[str] = mapped_column(Text)


class RevisionRow(Base):
    """One row, whose number every change of the library raises."""

    __tablename__ = "revision"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger)


class Setting(Base):
    """Switches of the whole library: the default spec, the kill switch. The row `blobs` is only ever locked."""

    __tablename__ = "setting"

    key: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[Any] = mapped_column(JSON)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, onupdate=now)


class AccessKey(Base):
    """A key of an API client. Of its secret only the SHA-256 is stored; `former_digest` is that of the secret before,
    which counts until `former_until`."""

    __tablename__ = "access_key"
    __table_args__ = (UniqueConstraint("tenant", "name"),)

    id: Mapped[str] = mapped_column(String(24), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    tenant: Mapped[str] = mapped_column(String(64))
    roles: Mapped[list[str]] = mapped_column(JSON)
    digest: Mapped[str] = mapped_column(String(64))
    former_digest: Mapped[str | None] = mapped_column(String(64))
    former_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    blocked: Mapped[bool]
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class PolicyRow(Base):
    """What requests of a tenant may ask for, or of one key, where key_id is not "". document: JSON text."""

    __tablename__ = "policy"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(24), primary_key=True)
    document: Mapped[str] = mapped_column(Text)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, onupdate=now)


class AliasRequirement(Base):
    """What an alias requires of a version before it may be moved there; see `vectors.library.requirements`. document:
    JSON text."""

    __tablename__ = "alias_requirement"

    named_id: Mapped[int] = mapped_column(ForeignKey("named.id", ondelete="RESTRICT"), primary_key=True)
    alias: Mapped[str] = mapped_column(String(32), primary_key=True)
    document: Mapped[str] = mapped_column(Text)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class RolloutRow(Base):
    """A version that is tried beside the one that an alias points at; see `vectors.library.rollouts`. terms: JSON text.
    history: what became of it, and by whom."""

    __tablename__ = "rollout"

    id: Mapped[str] = mapped_column(String(24), primary_key=True)
    named_id: Mapped[int] = mapped_column(ForeignKey("named.id", ondelete="RESTRICT"), index=True)
    alias: Mapped[str] = mapped_column(String(32))
    stable: Mapped[int]
    candidate: Mapped[int]
    status: Mapped[str] = mapped_column(String(16), index=True)
    step: Mapped[int]
    step_since: Mapped[datetime] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, index=True)
    terms: Mapped[str] = mapped_column(Text)
    history: Mapped[list[dict[str, Any]]] = mapped_column(JSON)

    named: Mapped[Named] = relationship(lazy="joined", innerjoin=True)


class RolloutTally(Base):
    """What one guard rail of a roll-out has seen, of all servers. wealth: logarithms, one for each stake; see
    `server.rollouts.evidence`."""

    __tablename__ = "rollout_tally"

    rollout_id: Mapped[str] = mapped_column(ForeignKey("rollout.id", ondelete="CASCADE"), primary_key=True)
    rail: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    stable_count: Mapped[int] = mapped_column(BigInteger)
    stable_sum: Mapped[float] = mapped_column(Double)
    candidate_count: Mapped[int] = mapped_column(BigInteger)
    candidate_sum: Mapped[float] = mapped_column(Double)
    rounds: Mapped[int] = mapped_column(BigInteger)
    wealth: Mapped[list[float]] = mapped_column(JSON)


class AuditRow(Base):
    """A record of the audit; see `vectors.library.audit.chain.Record`. before, after: JSON texts."""

    __tablename__ = "audit"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    action: Mapped[str] = mapped_column(String(64))
    target: Mapped[str] = mapped_column(String(200), index=True)
    before: Mapped[str | None] = mapped_column(Text)
    after: Mapped[str | None] = mapped_column(Text)
    key_id: Mapped[str | None] = mapped_column(String(24))
    key_name: Mapped[str] = mapped_column(String(64))
    tenant: Mapped[str] = mapped_column(String(64))
    address: Mapped[str] = mapped_column(String(64))
    request_id: Mapped[str] = mapped_column(String(64))
    previous: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))
