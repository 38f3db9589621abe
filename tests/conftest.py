"""What tests of several folders need."""

from collections.abc import Iterator

import pytest

from lab import model_path
from server.boot import build
from server.cli.inprocess import running
from server.settings import Settings


@pytest.fixture(scope="session")
def lab_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A whole server on the bundled model, shared: tests use artifact names of their own."""
    settings = Settings(model=str(model_path("lab-dense")), data_dir=tmp_path_factory.mktemp("lab-server"),
                        log_format="console")
    with running(build(settings)) as url:
        yield url
