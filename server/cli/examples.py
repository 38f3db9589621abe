"""The example artifacts and presets that come with a bundled model."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from server.cli.bundled import folder
from server.settings import Settings
from steering.language.errors import NotFound
from steering.language.spec import Spec
from vectors.formats import get_format
from vectors.library import Library

PRODUCTION = "production"


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

    marker: file that remembers which examples were loaded, so that one that a user deleted stays deleted. A name that
    the model has already keeps its versions and aliases as they are, whoever made it.

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
    stored = []
    for data in contents:
        metadata, payload = get_format("safetensors").read(data, {}, library.limits)
        # Presets belong with the artifacts that they name.
        library.serve(metadata.fingerprint or "")
        if not library.holds("artifact", metadata.name):
            stored.append(library.create(metadata, payload).ref)
            library.set_alias(metadata.name, PRODUCTION, 1)
    for entry in json.loads(presets.read_text()) if presets.exists() else ():
        preset = ExamplePreset.model_validate(entry)
        # Where a name of the user's own has no such version, the preset that names it is left out.
        with suppress(NotFound):
            if not library.holds("preset", preset.name):
                stored.append(library.presets.create(preset.name, preset.spec, preset.description).ref)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(digest + "\n")
    return stored
