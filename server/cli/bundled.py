"""The models that come with the package, found as data of `lab`. Imports nothing that loads torch."""

from importlib.resources import files
from pathlib import Path

from steering.language.errors import NotFound


def folder(kind: str) -> Path:
    """Folder of the package's models or artifacts."""
    return Path(str(files("lab"))) / kind


def bundled_models() -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in folder("models").glob("*/config.json")))


def with_examples() -> tuple[str, ...]:
    """Models that artifacts come with: the bundled ones, and fetched ones by their names."""
    return tuple(sorted(path.name for path in folder("artifacts").iterdir() if any(path.glob("*.safetensors"))))


def locate_model(name: str) -> str:
    """The folder of a bundled model; any other name is taken as it is, a folder or a Hugging Face id.

    Raises:
        NotFound: the name of a bundled model that is not there.
    """
    if name in bundled_models():
        return str(folder("models") / name)
    if name.startswith("lab-") and not Path(name).exists():
        raise NotFound(f"there is no bundled model {name}", param="model",
                       fix=f"Use one of {', '.join(bundled_models()) or 'your own models'}, or a folder.")
    return name
