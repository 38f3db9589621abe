from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vectors.making import open_library
from vectors import Library


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    opened = open_library(tmp_path)
    yield opened
    opened.close()
