"""A run of all claims about SmolLM2 that stopped goes on with the claim at which it stopped."""

from dataclasses import replace
from pathlib import Path

from lab.real.__main__ import wanted
from lab.real.claims import CLAIMS
from lab.real.progress import Progress


def test_a_run_that_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    claims = list(CLAIMS[:3])
    Progress(tmp_path / "run").finish(claims[0])
    again = Progress(tmp_path / "run")
    assert again.left(claims) == claims[1:]
    again.finish(claims[1])
    assert again.left(claims) == claims[2:]
    again.forget()
    assert again.left(claims) == claims and not (tmp_path / "run").exists()


def test_a_claim_that_is_measured_otherwise_is_not_done_and_one_that_is_told_otherwise_is(tmp_path: Path) -> None:
    progress, claim = Progress(tmp_path), CLAIMS[0]
    progress.finish(claim)
    assert progress.left([replace(claim, read="Read again.")]) == []
    fewer = replace(claim, tests=[replace(claim.tests[0], draws=2), *claim.tests[1:]])
    assert progress.left([fewer]) == [fewer]


def test_claims_bring_those_that_they_build_on() -> None:
    assert [claim.name for claim in wanted(["harmful"])] == ["caution", "harmful"]
    assert [claim.name for claim in wanted(["french"])] == ["french"]
