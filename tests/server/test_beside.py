"""Databases beside the library that are away: what is told of that names no machine and says when to come back."""

import time
from collections.abc import Callable

import pytest

from server.background.board import Board
from server.effects.store import EffectStore
from server.errors import status_of
from server.history.store import HistoryStore
from server.requests.stored.responses import StoredResponses
from steering.language.errors import TrimtabError

# Nothing listens on port 1.
URL = "postgresql://somebody@127.0.0.1:1/something"


@pytest.mark.parametrize("ask", [
    lambda: EffectStore(URL).totals(group="all"), lambda: Board(URL).all(),
    lambda: HistoryStore(URL, kept_s=60.0).read(0, int(time.time())),
    lambda: StoredResponses(URL, seconds=60.0, most_bytes=2**20).find("resp_1", "response_id")],
    ids=["effects", "jobs", "history", "responses"])
def test_who_is_away_is_said_without_its_place(ask: Callable[[], object]) -> None:
    with pytest.raises(TrimtabError) as caught:
        ask()
    assert not [word for word in ("127.0.0.1", "somebody", "something", "psycopg") if word in str(caught.value)]
    assert status_of(caught.value) == 503 and caught.value.retry_after_s
