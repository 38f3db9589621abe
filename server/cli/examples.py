"""The example artifacts and presets that come with a bundled model."""

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel

from server.cli.bundled import folder
from server.settings import Settings
from steering.language.spec import Spec
from vectors.formats import get_format
from vectors.library import Library

PRODUCTION = "production"
TAG = "bundled"


class ExamplePreset(BaseModel):
    """A preset as `lab/artifacts/MODEL/presets.json` lists them."""

    name: str
    description: str
    spec: Spec


def fill_library(settings: Settings, model: str) -> list[str]:
    """Load the examples of a bundled model into the library that `settings` name; the references stored."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    library = Library.open(settings.library_database_url, settings.library_blob_url)
    try:
        return load_examples(library, model, settings.data_dir / f"examples-{model}.sha256")
    finally:
        library.close()


def load_examples(library: Library, model_name: str, marker: Path) -> list[str]:
    """Put the example artifacts and presets of a bundled model into the library, unless that was done before.

    marker: file that remembers which examples were loaded, so that one that a user deleted stays deleted. A newer
    bundle adds new versions; `production` moves to them only where it stood on a bundled version.

    Returns the references that were stored.
    """
    source = folder("artifacts") / model_name
    paths = sorted(source.glob("*.safetensors"))
    presets = source / "presets.json"
    if not paths:
        return []
    contents = [path.read_bytes() for path in paths]
    digest = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in [
        *contents, presets.read_bytes() if presets.exists() else b""])).hexdigest()
    if marker.exists() and marker.read_text().strip() == digest:
        return []
    stored = [_store(library, data) for data in contents]
    if presets.exists():
        for entry in json.loads(presets.read_text()):
            preset = ExamplePreset.model_validate(entry)
            stored.append(library.presets.create(preset.name, preset.spec, preset.description).ref)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(digest + "\n")
    return stored


def _store(library: Library, data: bytes) -> str:
    metadata, payload = get_format("safetensors").read(data, {}, library.limits)
    artifact = library.create(metadata, payload)
    versions = library.versions(metadata.name)
    holder = next((version for version in versions if PRODUCTION in version.aliases), None)
    if holder is None or TAG in holder.metadata.tags:
        library.set_alias(metadata.name, PRODUCTION, artifact.version)
    return artifact.ref
