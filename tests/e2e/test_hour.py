"""The script of the hour goes through all of its steps. Its demands are about SmolLM2; this is the bundled model."""

import os
from argparse import Namespace

import pytest
from trimtab_client import Client

from benchmarks.hour.__main__ import LANGUAGE, TONE, hour
from lab.real.clock import Clock


@pytest.mark.slow
def test_every_step_of_the_hour_is_done(lab_url: str) -> None:
    clock = Clock(os.getpid())
    with Client(lab_url) as client:
        found = hour(client, clock, Namespace(prompts=2, draws=1, tokens=6, effort="quick"))
        assert {TONE, LANGUAGE} <= {artifact.name for artifact in client.list_artifacts(q="hour-").data}
    assert len(found.random) == 1 and len(found.texts) == 4
    assert {len(text) for text in found.texts} == {5}
    steps = [step.partition(":")[0] for step in clock.seconds]
    assert steps == ["tone", "french", "tone", "tone", "french", "a preset"]
