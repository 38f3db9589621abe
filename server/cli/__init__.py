"""The command `trimtab`."""

from server.cli.main import app

__all__ = ["app"]
