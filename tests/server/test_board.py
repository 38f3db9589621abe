"""Jobs that servers share: who holds which, and that none is done by two."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import server.background.board
from server.background.board import LEASE_S, MARGIN_S, MOST_ATTEMPTS, Asked, Board
from server.background.job import Cancelled, Control, Job

ASKED = Asked("POST", "/v1/extract", "model=m", '{"name": "made"}', {"name": "owner", "tenant": "default", "roles": [],
                                                                     "key_id": None})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(server.background.board, "_now", lambda session: now[0])
    return now


@pytest.fixture
def board(tmp_path: Path, clock: list[float]) -> Iterator[Board]:
    found = Board(f"sqlite:///{tmp_path}/jobs.db")
    yield found
    found.close()


def job(number: int = 1, owner: str = "a", **fields: object) -> Job:
    return Job.model_validate({"id": f"job-{number:024x}", "kind": "extract", "owner": owner,
                               "created_at": float(number), **fields})


def test_a_job_is_taken_once_its_lease_is_over_and_not_before(board: Board, clock: list[float]) -> None:
    board.add(job(), ASKED)
    assert board.take("b") is None
    clock[0] += LEASE_S
    assert board.beat("a", [job(progress=0.5)]).lost == frozenset()
    clock[0] += LEASE_S + MARGIN_S
    assert board.take("b") is None
    clock[0] += 0.1
    taken = board.take("b")
    assert taken is not None and taken[1] == ASKED
    assert (taken[0].id, taken[0].owner, taken[0].progress) == (job().id, "b", 0.5)
    # Nobody else gets it, and whoever had it learns that it lost it.
    assert board.take("c") is None
    assert board.beat("a", [job(status="succeeded")]).lost == {job().id}
    assert board.all()[0].status == "queued"
    assert board.beat("b", [job(owner="b", status="succeeded")]).lost == frozenset()
    clock[0] += 10 * LEASE_S
    assert board.take("c") is None and board.all()[0].status == "succeeded"


def test_the_oldest_is_taken_first_and_what_is_released_at_once(board: Board) -> None:
    for number in (3, 1, 2):
        board.add(job(number), ASKED)
    board.release("a", [job(2).id, job(3).id])
    board.release("b", [job(1).id])
    assert [taken[0].id for _ in range(3) if (taken := board.take("b")) is not None] == [job(2).id, job(3).id]


def test_what_servers_die_of_is_given_up(board: Board, clock: list[float]) -> None:
    board.add(job(), ASKED)
    for _ in range(MOST_ATTEMPTS - 1):
        clock[0] += LEASE_S + MARGIN_S + 1
        assert board.take("b") is not None
    clock[0] += LEASE_S + MARGIN_S + 1
    assert board.take("b") is None
    left = board.all()[0]
    assert left.status == "failed" and left.error is not None and left.error["code"] == "interrupted"


def test_cancelling_reaches_whoever_runs_it(board: Board, clock: list[float]) -> None:
    board.add(job(), ASKED)
    board.cancel(job().id)
    assert board.beat("a", [job()]).unwanted == {job().id}
    clock[0] += LEASE_S + MARGIN_S + 1
    assert board.take("b") is None and board.all()[0].status == "cancelled"


def test_what_could_not_be_begun_is_gone(board: Board) -> None:
    board.add(job(), ASKED)
    board.remove(job().id, "b")
    assert board.all() == [job()]
    board.remove(job().id, "a")
    assert board.all() == []


def test_nothing_is_stored_behind_the_end_of_a_lease() -> None:
    control = Control(job())
    control.check()
    control.hold(time.monotonic() - 0.001)
    with pytest.raises(Cancelled):
        control.check()
    assert control.expired and not control.cancelled()
