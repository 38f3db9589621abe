"""Roll-outs and requirements in the library: their states, with several writers at once."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from steering.language.errors import Conflict, NotFound, TrimtabError
from steering.language.spec import Spec
from tests.vectors.making import metadata, vector_payload
from vectors import Library
from vectors.library.requirements import EvaluationRequired
from vectors.library.rollouts import StoredRollout, Tally

TERMS = {"steps": [{"share": 0.5}]}


@pytest.fixture
def made(library: Library) -> StoredRollout:
    """A draft of cheer@production, from version 1 to 2."""
    library.create(metadata(), vector_payload(1))
    for strength in (1.0, 2.0):
        library.presets.create("cheer", Spec.model_validate(
            {"interventions": [{"artifact": "cheerful", "strength": strength}]}))
    library.presets.set_alias("cheer", "production", 1)
    return library.rollouts.create("preset", "cheer", "production", 2, TERMS)


def test_one_of_several_that_are_published_at_once_acts(library: Library, made: StoredRollout) -> None:
    ids = [made.id, *(library.rollouts.create("preset", "cheer", "production", 2, TERMS).id for _ in range(3))]

    def publish(id: str) -> str:
        try:
            return library.rollouts.publish(id).status
        except Conflict:
            return "refused"

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(publish, ids)) == ["published", "refused", "refused", "refused"]
    assert len(library.rollouts.running()) == 1


def test_steps_and_ends_happen_once(library: Library, made: StoredRollout) -> None:
    library.rollouts.publish(made.id)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: library.rollouts.advance(made.id, 0), range(4)))
        assert library.rollouts.find(made.id).step == 1
        ended = list(threads.map(lambda n: library.rollouts.give_back(made.id, str(n)), range(4)))
    assert {one.status for one in ended} == {"returned"}
    assert [one["what"] for one in library.rollouts.find(made.id).history].count("returned") == 1
    with pytest.raises(Conflict):
        library.rollouts.promote(made.id)
    assert library.presets.resolve("cheer").version == 1 and library.audit.verify().fault is None


def test_samples_of_several_servers_add_up_and_change_nothing_else(library: Library, made: StoredRollout) -> None:
    library.rollouts.publish(made.id)
    before = library._database.revision.current()
    one = Tally(2, 1.0, 3, 0.5, 2, (0.25, -0.5))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: library.rollouts.add({(made.id, 0): one, ("ro-gone", 0): one}), range(8)))
    total = library.rollouts.tallies([made.id])[made.id][0]
    assert (total.stable_count, total.candidate_count, total.rounds) == (16, 24, 16)
    assert total.wealth == pytest.approx((2.0, -4.0)) and total.candidate_sum == pytest.approx(4.0)
    # Whatever is remembered of the library stays true.
    assert library._database.revision.current() == before
    library.rollouts.promote(made.id)
    library.rollouts.add({(made.id, 0): one})
    assert library.rollouts.tallies([made.id])[made.id][0] == total
    library.rollouts.delete(made.id)
    assert library.rollouts.tallies([made.id]) == {}


def test_a_requirement_is_held_in_the_transaction_of_the_move(library: Library, made: StoredRollout) -> None:
    library.requirements.set("preset", "cheer", "production", {
        "bounds": [{"figure": "kl", "grader": None, "at_least": None, "at_most": 0.5}], "prompts": 1})
    for move in (lambda: library.presets.set_alias("cheer", "production", 2),
                 lambda: library.rollouts.publish(made.id)):
        with pytest.raises(EvaluationRequired):
            move()
    assert library.presets.resolve("cheer").version == 1 and library.audit.verify().fault is None
    summary = {"id": "eval-1", "fingerprint": "", "preset": "cheer@2", "artifacts": ["cheerful@1"], "graders": [],
               "prompts": 1, "results": [{"dose": 1.0, "kl": 0.2}]}
    library.evaluations.add("eval-1", datetime.now(UTC), ["cheer@2", "cheerful@1"], summary, "{}")
    library.rollouts.publish(made.id)
    assert library.rollouts.promote(made.id).status == "production"
    with pytest.raises(TrimtabError):
        library.presets.delete("cheer", force=True)
    library.requirements.delete("preset", "cheer", "production")
    with pytest.raises(NotFound):
        library.requirements.delete("preset", "cheer", "production")
    assert library.presets.delete("cheer", force=True) == ["cheer@2", "cheer@1"]
