"""Stop strings, against cutting the whole text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.stops import StopMatcher

TEXT = st.text(alphabet="ab ", max_size=30)


def sent(chunks: list[str], stops: list[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stops)
    out = [matcher.push(chunk) for chunk in chunks]
    return [*out, matcher.flush()], matcher.stopped


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.text(alphabet="ab ", max_size=5), max_size=10), st.text(alphabet="ab ", min_size=1, max_size=4))
def test_one_stop_cuts_the_text_where_it_first_stands(chunks: list[str], stop: str) -> None:
    text = "".join(chunks)
    out, stopped = sent(chunks, [stop])
    assert "".join(out) == text.partition(stop)[0]
    assert stopped == (stop in text)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(TEXT, st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_letter_by_letter_no_part_of_a_stop_is_ever_sent(text: str, stops: list[str]) -> None:
    out, stopped = sent(list(text), stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert "".join(out) == text and not stopped
        return
    # Letter by letter, the first stop to be complete wins.
    seen = text[:min(ends)]
    assert stopped
    assert "".join(out) == seen[:min(seen.find(stop) for stop in stops if stop in seen)]


def test_held_back_only_while_it_may_match() -> None:
    out, stopped = sent(["say ST", "O", "x", " ST"], ["STOP"])
    assert out == ["say ", "", "STOx", " ", "ST"]
    assert not stopped


def test_without_stops_nothing_is_held() -> None:
    assert sent(["a", "b"], [])[0] == ["a", "b", ""]
