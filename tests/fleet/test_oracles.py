"""The oracles of the fleet see what they are there for, and nothing where all is well."""

from typing import Any

import pytest

from tests.fleet.facts import place
from tests.fleet.load import CHAT, Answer
from tests.fleet.oracles import due, gaps, miscounted, over_quota, unaudited
from tests.fleet.timelines import Timeline, lateness


def answer(began: float, ended: float = 0.0, **fields: Any) -> Answer:
    found = Answer("POST", CHAT, "k", {}, began, first=began, ended=ended or began, replica="a", status=200)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


@pytest.fixture
def line() -> Timeline:
    """1 at first, 2 from 10 on and acknowledged at 11, 3 at 20, refused, and 4 at 30, of which nobody knows."""
    made = Timeline("calm", 1)
    made.send(2, 10.0).acknowledged = 11.0
    made.send(3, 20.0).refused = True
    made.send(4, 30.0)
    return made


@pytest.mark.parametrize(("began", "ended", "possible"), [
    (5.0, 9.0, {1}), (5.0, 10.0, {1, 2}), (11.9, 11.9, {1, 2}), (12.0, 12.0, {2}), (21.0, 29.0, {2}),
    (31.0, 31.0, {2, 4}), (99.0, 99.0, {2, 4})])
def test_what_an_answer_may_follow(line: Timeline, began: float, ended: float, possible: set[int]) -> None:
    assert line.possible(began, ended, 1.0) == possible


def test_a_change_that_is_acknowledged_ends_what_nobody_knew(line: Timeline) -> None:
    line.send(5, 40.0).acknowledged = 41.0
    assert line.possible(41.5, 41.5, 1.0) == {2, 4, 5} and line.possible(42.0, 42.0, 1.0) == {5}
    assert (line.last, line.open) == (5, False)


def test_what_the_database_could_not_tell_it_tells_when_it_is_back(line: Timeline) -> None:
    away = due([(11.5, 50.0)])
    assert line.possible(50.9, 50.9, 1.0, away) == {1, 2, 4} and line.possible(51.0, 51.0, 1.0, away) == {2, 4}
    assert line.possible(12.0, 12.0, 1.0, due([(13.0, 50.0)])) == {2}


def test_how_late_an_answer_is(line: Timeline) -> None:
    assert lateness(line, {1}, 14.0) == 3.0 and lateness(line, {2}, 14.0) == 0.0 == lateness(line, {1}, 10.5)


@pytest.mark.parametrize(("answers", "over"), [
    ([answer(n) for n in (0.0, 1.0, 59.0)], True), ([answer(n) for n in (0.0, 1.0, 60.0)], False),
    ([answer(59.5, first=60.5), answer(0.0), answer(1.0)], False),
    ([answer(0.0, 9.0, stream=True), answer(1.0, 9.0, stream=True)], True),
    ([answer(0.0, 1.0, stream=True), answer(1.0, 9.0, stream=True)], False),
    ([answer(0.0, status=429) for _ in range(9)], False)])
def test_more_than_a_quota_lets_in(answers: list[Answer], over: bool) -> None:
    assert bool(over_quota(answers, 2, 1, offset=0.0)) is over


def test_what_the_audit_lacks() -> None:
    records = [{"number": n, "request_id": f"r{n}", "target": f"t{n}", "digest": f"d{n}", "previous": f"d{n - 1}"}
               for n in range(1, 4)]
    assert gaps(records) == [] and len(gaps([records[0], records[2]])) == 1
    assert len(gaps([records[0], records[1] | {"previous": "x"}])) == 1
    assert unaudited([answer(0.0, request_id="r1")], records, {"t2"}) == []
    assert len(unaudited([answer(0.0, request_id="r9")], records, {"t9"})) == 2


def test_answers_that_are_counted_twice_or_not() -> None:
    assert miscounted("a", [answer(0.0), answer(1.0, status=503)], {200: 1, 503: 1}) == []
    assert len(miscounted("a", [answer(0.0), answer(1.0, replica="b")], {200: 2})) == 1
    assert len(miscounted("a", [answer(0.0)], {})) == 1


def test_where_a_user_stands() -> None:
    """The first 16 digits of what `printf 'ro-1\\ngreen\\nuser:u1' | sha256sum` says."""
    assert place("ro-1", "green", "u1") == 0x696B5E1B9C844BE7 / 2**64
