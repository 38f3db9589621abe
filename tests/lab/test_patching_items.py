"""Items of the swaps: what directions are found on is none of what they are checked on."""

from lab.real import patching


def test_dev_and_test_share_no_item_and_pairs_swap_both_ways() -> None:
    assert not set(patching.DEV_NOUNS) & set(patching.TEST_NOUNS)
    assert len(set(patching.TEST_NOUNS)) == len(patching.TEST_NOUNS)
    pairs = patching.agreement(patching.TEST_NOUNS)
    assert len(pairs) == 4 * len(patching.TEST_NOUNS)
    for one, many in zip(pairs[::2], pairs[1::2], strict=True):
        assert (one["base"], one["base_answer"]) == (many["source"], many["source_answer"])
    for frames in (patching.DAY_FRAMES, patching.LAB_DAY_FRAMES):
        assert frames["dev"] != frames["test"]
    days = patching.weekdays("{}")
    assert len(days) == 14 and all(pair["base_answer"] != pair["source_answer"] for pair in days)
    assert days[0] == {"base": "Monday", "base_answer": " Tuesday", "source": "Wednesday",
                       "source_answer": " Thursday"}
