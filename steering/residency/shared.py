"""Rows of a table that are shared by content: equal content has one row, and a row is free when nobody uses it."""

from collections.abc import Callable, Iterable


class SharedRows:
    """Which row holds which content, and how many use it. The numbers themselves lie elsewhere.

    Args:
        rows: those that are free at first; the last is given out first.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self._free = list(rows)
        self._row_of: dict[bytes, int] = {}
        self._content_of: dict[int, bytes] = {}
        self._users: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._row_of)

    def grow(self, rows: Iterable[int]) -> None:
        """Add free rows."""
        self._free.extend(rows)

    def acquire(self, content: bytes, write: Callable[[int], object]) -> int | None:
        """The row that holds the content with this digest, for one more user. None where no row is free.

        write: puts the content into a row that did not hold it. If it fails the row stays free.
        """
        row = self._row_of.get(content)
        if row is None:
            if not self._free:
                return None
            row = self._free[-1]
            write(row)
            self._free.pop()
            self._row_of[content], self._content_of[row], self._users[row] = row, content, 0
        self._users[row] += 1
        return row

    def release(self, row: int) -> None:
        """Count one user of a row less."""
        self._users[row] -= 1
        if not self._users[row]:
            del self._users[row], self._row_of[self._content_of.pop(row)]
            self._free.append(row)
