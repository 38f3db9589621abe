"""Rows shared by content."""

import random

import pytest

from steering.residency.shared import SharedRows


def test_equal_content_has_one_row_until_nobody_uses_it() -> None:
    written: list[int] = []
    rows = SharedRows([7, 3])
    assert [rows.acquire(b"a", written.append), rows.acquire(b"a", written.append)] == [3, 3]
    assert rows.acquire(b"b", written.append) == 7 and written == [3, 7]
    assert rows.acquire(b"c", written.append) is None
    rows.release(3)
    assert rows.acquire(b"c", written.append) is None, "somebody uses it still"
    rows.release(3)
    assert rows.acquire(b"c", written.append) == 3 and written == [3, 7, 3]
    rows.grow([9])
    assert (rows.num_free, rows.num_used) == (1, 2)


def test_a_row_that_cannot_be_written_stays_free() -> None:
    def fail(row: int) -> None:
        raise MemoryError

    rows = SharedRows([0])
    with pytest.raises(MemoryError):
        rows.acquire(b"a", fail)
    assert (rows.num_free, rows.num_used) == (1, 0)
    assert rows.acquire(b"b", lambda row: None) == 0


def test_it_holds_what_a_plain_count_says() -> None:
    chance = random.Random(0)
    rows, held = SharedRows(range(8)), []
    contents: dict[int, bytes] = {}
    for _ in range(2000):
        if held and chance.random() < 0.5:
            rows.release(held.pop(chance.randrange(len(held)))[1])
            continue
        content = bytes([chance.randrange(12)])
        row = rows.acquire(content, lambda row, content=content: contents.update({row: content}))
        used = {one for one, _ in held}
        assert (row is None) == (content not in used and len(used) == 8)
        if row is not None:
            held.append((content, row))
        assert all(contents[row] == content for content, row in held)
        assert rows.num_used == len({content for content, _ in held}) == 8 - rows.num_free
