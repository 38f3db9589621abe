"""Artifacts as the database keeps them."""

from collections.abc import Sequence

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from vectors.artifact import Artifact, Metadata
from vectors.library import naming
from vectors.library.tables import ArtifactRow, Tag
from vectors.storage_errors import LibraryUnavailable


def read_artifacts(session: Session, version_ids: Sequence[int]) -> list[Artifact]:
    """Artifacts in the order of `version_ids`."""
    rows = {row.version_id: row for row in session.scalars(
        select(ArtifactRow).where(ArtifactRow.version_id.in_(version_ids)))}
    aliases = naming.aliases_of(session, version_ids)
    return [_artifact(rows[n], aliases.get(n, ())) for n in version_ids]


def tag_rows(tags: tuple[str, ...]) -> list[Tag]:
    return [Tag(tag=tag, position=position) for position, tag in enumerate(tags)]


def _artifact(row: ArtifactRow, aliases: tuple[str, ...]) -> Artifact:
    try:
        created = Metadata.model_validate_json(row.document)
    except ValidationError as error:
        raise LibraryUnavailable(f"the metadata of version {row.version.number} of an artifact cannot be read: "
                                 f"{error}") from error
    metadata = created.model_copy(update={"description": row.description, "card": row.card,
                                          "tags": tuple(tag.tag for tag in row.tags)})
    return Artifact(metadata, row.version.number, row.blob, row.nbytes, tuple(row.layers), aliases,
                    row.version.created_at)
