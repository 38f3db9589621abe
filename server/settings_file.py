"""Settings from a file in YAML or TOML, and values of settings from files of their own, as secrets are mounted."""

import os
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from server.errors import InvalidSettings

ENV = "TRIMTAB_"
VARIABLE = f"{ENV}CONFIG"
# Behind the name of a setting: the file that holds its value.
FROM_FILE = "_file"
MOST_BYTES = 2**20


class FileSettings(PydanticBaseSettingsSource):
    """What the settings file says; below the environment and above the defaults.

    Args:
        path: of the file; None where there is none.
    """

    def __init__(self, settings: type[BaseSettings], path: Path | None) -> None:
        super().__init__(settings)
        self._found = {} if path is None else read(path, settings.model_fields)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._found.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._found


class SecretFiles(PydanticBaseSettingsSource):
    """Settings whose value is in a file that an environment variable names: TRIMTAB_API_KEY_FILE for api_key."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        path = os.environ.get(f"{ENV}{field_name.upper()}{FROM_FILE.upper()}")
        return (None if path is None else content(Path(path), field_name)), field_name, False

    def __call__(self) -> dict[str, Any]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


def read(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """The settings in a file, by name.

    Raises:
        InvalidSettings: it cannot be read, is not a table of settings, or has one that does not exist.
    """
    text = content(path, "config")
    try:
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        kind = "TOML" if path.suffix == ".toml" else "YAML"
        raise InvalidSettings(f"{path} is no {kind}: {' '.join(str(error).split())}"[:400], param="config",
                              fix="A file that ends in .toml is read as TOML, any other one as YAML.") from error
    if not isinstance(found, Mapping):
        raise InvalidSettings(f"{path} holds no table of settings", param="config",
                              fix="Write one setting in a line, such as `port: 8000`.")
    known = set(names) - {"config"}
    settings: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key)
        if name.removesuffix(FROM_FILE) in known - {name}:
            name = name.removesuffix(FROM_FILE)
            value = content(path.parent / str(value), name)
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise InvalidSettings(f"{path} has {name[:100]!r}, which is no setting", param="config",
                                  fix=f"Did you mean {near[0]}?" if near else "docs/settings.md lists all of them.")
        if name in settings:
            raise InvalidSettings(f"{path} has both {name} and {name}{FROM_FILE}", param="config",
                                  fix="Leave one of them out.")
        settings[name] = value
    return settings


def content(path: Path, name: str) -> str:
    """Text of a file, without the line break at its end.

    Raises:
        InvalidSettings: naming the setting it was read for.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidSettings(f"the file {path} cannot be read: {why}", param=name,
                              fix="Check the path, and that the server may read it.") from error
    if len(raw) > MOST_BYTES:
        raise InvalidSettings(f"the file {path} has more than {MOST_BYTES} bytes", param=name,
                              fix="Name the file that holds the setting.")
    return text.rstrip("\r\n")
