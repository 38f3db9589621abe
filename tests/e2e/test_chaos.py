"""Every trouble of the chaos benchmark once, in small amounts: the embedded engine in a server of its own."""

import pytest

from benchmarks.chaos.chaos import Amounts
from benchmarks.chaos.run import run

# Readiness has two seconds on a machine of its own; this one runs other tests meanwhile.
SMALL = Amounts(size=1, mixed=16, uploads=30, kills=1, mutations=30, truth_s=10.0, stall_s=60.0)


@pytest.mark.slow
async def test_nothing_hurts_another() -> None:
    result = await run("lab-dense", "transformers", 1, SMALL, minutes=0)
    faults = "\n\n".join(result["faults"])
    assert not faults, f"{len(result['faults'])} faults:\n\n{faults}\n\nnotes: {result['notes']}"
    assert result["counts"]["innocent"] > 50
