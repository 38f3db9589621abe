"""What a GGUF file says it is, read before anything is made of it."""

from pathlib import Path

from steering.language.errors import UnsupportedModel

MAGIC = b"GGUF"
# What the reader of the gguf package raises on files that are not as they should be.
MALFORMED = (ValueError, KeyError, IndexError, TypeError, OverflowError, AttributeError)


def check_gguf(path: Path) -> str:
    """The architecture of the language model in the file.

    Raises:
        UnsupportedModel: naming the file, and what it is instead of one whole language model.
    """
    # Takes half a second to import, which models in other forms need not wait for.
    from gguf import GGUFReader

    named = path.name
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
        if magic != MAGIC:
            raise UnsupportedModel(f"{named} is no GGUF file", param="model")
        fields = GGUFReader(path).fields
    except OSError as error:
        raise UnsupportedModel(f"{path} cannot be read: {error.strerror or error}", param="model") from error
    except MALFORMED as error:
        raise UnsupportedModel(f"{named} is a damaged GGUF file ({error})", param="model",
                               fix="Fetch it again.") from error
    said = {name: fields[name].contents() for name in ("general.architecture", "general.type", "split.count")
            if name in fields}
    architecture = str(said.get("general.architecture", "unknown"))
    if architecture == "controlvector":
        raise UnsupportedModel(f"{named} holds a control vector, no model", param="model",
                               fix=f"Put it into the library: trimtab artifacts import {named} --name NAME.")
    if said.get("general.type", "model") != "model":
        raise UnsupportedModel(f"{named} holds a GGUF {said['general.type']}, no model", param="model",
                               fix="Name the file of the whole model.")
    if int(said.get("split.count", 1)) > 1:
        raise UnsupportedModel(f"{named} is one of {said['split.count']} parts of a model", param="model",
                               fix="Join them: llama-gguf-split --merge FIRST_PART WHOLE.gguf")
    return architecture
