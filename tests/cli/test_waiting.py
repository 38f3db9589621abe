"""What a command says while it waits for a job."""

from collections.abc import Callable
from typing import Any

import pytest
from trimtab_client import Job

from server.cli.waiting import finished, said

STAGES = {"fit": "fitting"}


def job(**fields: Any) -> Job:
    return Job.model_validate({"id": "job-1", "kind": "extract", "status": "running", **fields})


class Script:
    """A client whose job goes through these states."""

    def __init__(self, *states: Job) -> None:
        self.states = states

    def wait(self, job_id: str, *, on_progress: Callable[[Job], None]) -> Job:
        for state in self.states:
            on_progress(state)
        return self.states[-1]


def test_without_a_terminal_there_is_a_line_for_every_stage_and_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    behind = {"id": "job-0", "kind": "calibrate", "about": "calm@1"}
    states = [job(status="queued", place=1, behind=behind), job(stage="fit"), job(stage="fit", progress=0.04),
              job(stage="fit", progress=0.55), job(status="succeeded", progress=1.0, result={})]
    client: Any = Script(*states)
    assert finished(client, states[0], STAGES) is states[-1]
    assert capsys.readouterr().err.splitlines() == [
        "  0% waits: place 1 in the queue, behind calibrate of calm@1 (job-0)", "  0% fitting", " 55% fitting"]


def test_one_that_was_passed_while_it_ran_says_so() -> None:
    assert said(job(place=1, behind={"id": "job-2", "kind": "tune"}), STAGES) == (
        "lets a shorter job pass: place 1 in the queue, behind tune (job-2)")
