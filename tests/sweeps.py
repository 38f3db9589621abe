"""Sweeps: the same test over many cases, of which `make test` runs a few and `make test-all` the others too."""

from collections.abc import Sequence
from typing import Any

import pytest


def sweep_of(*cases: Any, slow: Sequence[Any]) -> list[Any]:
    """Parameters of a test or a fixture. Those in `slow` run only where sweeps do."""
    return [*cases, *(pytest.param(case, marks=pytest.mark.slow) for case in slow)]
