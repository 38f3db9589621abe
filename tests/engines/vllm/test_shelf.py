"""What a worker keeps of completions has a bound, and what the engine waits for has none."""

import numpy as np
import torch

from server.engines.vllm.worker.shelf import PASS, Shelf


def rows(first: int, count: int) -> tuple[np.ndarray, torch.Tensor]:
    positions = np.arange(first, first + count)
    return positions, torch.from_numpy(positions).float().unsqueeze(1).repeat(1, 4)


def test_rows_are_found_by_position_and_a_gap_is_told() -> None:
    shelf = Shelf(1000)
    shelf.hold("a")
    shelf.keep("a", *rows(5, 2))
    shelf.keep("a", *rows(7, 1))
    found = shelf.span("a", 5, 3)
    assert found is not None and found[:, 0].tolist() == [5, 6, 7]
    assert shelf.span("a", 5, 4) is None and shelf.span("b", 5, 1) is None
    shelf.keep("a", *rows(9, 1))
    assert shelf.span("a", 5, 5) is None and shelf.nbytes == 4 * 16
    shelf.forget("a")
    assert shelf.nbytes == 0 and shelf.span("a", 5, 1) is None


def test_over_the_bound_the_oldest_goes_and_stays_away() -> None:
    shelf = Shelf(6 * 16)
    for tag in ("a", "b"):
        shelf.hold(tag)
        shelf.keep(tag, *rows(0, 3))
    shelf.capture("b", ("resid_post", 1), *rows(0, 1))
    assert shelf.span("a", 0, 1) is None and "a" in shelf.dropped
    assert shelf.span("b", 0, 3) is not None and shelf.span("b", 0, 1, ("resid_post", 1)) is not None
    shelf.keep("a", *rows(3, 1))
    assert shelf.hidden.keys() == {"b"} and shelf.nbytes == 4 * 16


def test_passes_that_are_waited_for_do_not_count() -> None:
    shelf = Shelf(0)
    shelf.keep(f"{PASS}1", *rows(0, 3))
    shelf.hold("a")
    shelf.keep("a", *rows(0, 1))
    assert shelf.span(f"{PASS}1", 0, 3) is not None and shelf.nbytes == 0 and "a" in shelf.dropped
