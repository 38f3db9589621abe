"""Puts the built console into a wheel, as server/web. Without it a wheel is made all the same; its `/` says so."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConsoleFiles(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        built = Path(self.root) / "clients" / "web" / "dist"
        # An editable install reads the folder where it is.
        if version != "editable" and (built / "index.html").is_file():
            build_data["force_include"][str(built)] = "server/web"
