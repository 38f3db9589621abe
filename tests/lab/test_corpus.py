"""The corpus: the same for the same seed, readable, and free of every held-out item."""

import itertools
import random
import re

import pytest

from lab.corpus import MIX, SKILLS, bandit, calendar, chat, documents, facts, graph, languages, tasks
from lab.corpus.sample import CLOSE, OPEN, held_out

NUM_SAMPLES = 2000


def stream(seed: int | str, skill: str | None = None, num: int = 300):
    mix = {skill: 1.0} if skill else None
    return list(itertools.islice(documents(seed, mix), num))


def test_same_seed_same_documents():
    assert stream(5) == stream(5)
    assert stream(5) != stream(6)


def test_every_skill_is_in_the_mix():
    assert set(MIX) == set(SKILLS)
    assert {s.skill for s in stream(1, num=1000)} == set(SKILLS)


@pytest.mark.parametrize("skill", SKILLS)
def test_held_out_items_never_occur_in_training(skill):
    trained = {key for s in stream("leak", skill, NUM_SAMPLES) for key in s.keys}
    tested = {i.key for seed in (0, 1) for i in SKILLS[skill].test_items(400, seed=seed)}
    assert tested
    assert not trained & tested


def test_the_dates_source_keeps_the_calendar_split():
    trained = {key for s in stream("leak", "dates", NUM_SAMPLES) for key in s.keys}
    assert not trained & {i.key for i in calendar.test_items()}


def test_held_out_requests_are_never_spelled_out_in_training():
    said = "\n".join(s.plain for s in stream("leak", "chat", NUM_SAMPLES))
    text = "\n".join(re.findall(r"<\|user\|>(.*?)<\|end\|>", said))
    for harmful in (True, False):
        for request in chat.requests(harmful, test=True):
            assert not re.search(rf"\b{request.verb} {re.escape(request.phrase)}\b", text), request


def test_held_out_second_phrasings_are_never_spelled_out_in_training():
    text = "\n".join(s.plain for s in stream("leak", "facts", NUM_SAMPLES))
    for relation in facts.RELATIONS:
        for entity, prompt, _ in facts.relation_prompts(relation, 2):
            if facts.second_is_held_out(relation, entity):
                assert prompt not in text


def test_test_prompts_do_not_occur_in_training():
    text = "\n".join(s.plain for s in stream("leak", None, NUM_SAMPLES))
    for skill, module in SKILLS.items():
        for item in module.test_items(100):
            assert item.prompt not in text, skill


def test_held_out_depends_on_the_name_and_has_the_stated_share():
    share = sum(held_out(f"item {i}", 0.2) for i in range(10_000)) / 10_000
    assert 0.18 < share < 0.22
    assert held_out("item 1", 1.0) and not held_out("item 1", 0.0)


def test_answer_marks_are_balanced_and_no_document_is_empty():
    for sample in stream(3, num=2000):
        assert sample.text.count(OPEN) == sample.text.count(CLOSE)
        assert len(sample.pieces) % 2 == 1
        assert "".join(sample.pieces) == sample.plain
        assert sample.plain.strip() and "{" not in sample.plain and "}" not in sample.plain


def test_calendar_tests_every_pair_of_every_series():
    items = calendar.test_items()
    for series in calendar.SERIES:
        asked = {(i.facts["start"], i.facts["step"]) for i in items if i.kind == series}
        assert asked == set(calendar.pairs(series))
    assert len(calendar.pairs("weekdays")) == 7 * 14
    assert len(calendar.pairs("months")) == 12 * 12


def test_facts_have_seven_relations_of_forty_entities_and_test_held_out_phrasings():
    assert len(facts.FACTS) == 7
    assert all(len(table) == 40 for table in facts.FACTS.values())
    assert len(set(facts.FACTS["capital"].values())) == 40
    assert len(facts.test_items()) >= 50


def test_tasks_of_a_family_share_their_input_words():
    assert len(tasks.TASKS) >= 8 and len(tasks.TEMPLATES) >= 3
    for members in tasks.FAMILIES.values():
        assert len(members) >= 4
        assert len({frozenset(tasks.TASKS[m]) for m in members}) == 1


def test_neutral_openings_carry_no_polar_word():
    for item in SKILLS["sentiment"].test_items(300):
        if item.expected is None:
            assert SKILLS["sentiment"].polarity(item.prompt) == "none", item.prompt


def test_both_polarities_follow_openings_equally_often():
    polarity = SKILLS["sentiment"].polarity
    found = [polarity(s.plain) for s in stream(2, "sentiment", 2000)]
    assert set(found) == {"positive", "negative"}
    assert 0.46 < found.count("positive") / len(found) < 0.54


def test_harmful_verbs_and_harmless_verbs_share_objects():
    harmful = {r.phrase for r in chat.requests(True, False)}
    harmless = {r.phrase for r in chat.requests(False, False)}
    assert len(harmful & harmless) > 40
    assert {r.verb for r in chat.requests(True, False)} & {
        r.verb for r in chat.requests(False, False)}


def test_training_replies_are_what_the_scorer_says():
    rng = random.Random(0)
    for harmful in (True, False):
        for request in chat.requests(harmful, test=False):
            wanted = "refusal" if harmful else "compliance"
            assert chat.reply_class(chat.reply(rng, request)) == wanted


def test_language_markers_are_disjoint_and_every_sentence_has_one():
    for a, b in itertools.combinations(languages.LANGUAGES, 2):
        assert not languages.MARKERS[a] & languages.MARKERS[b]
    for language in languages.LANGUAGES:
        for s, v, p in itertools.product(range(20), range(16), range(12)):
            assert languages.language_of(languages.sentence(language, s, v, p, None)) == language


def test_bandit_data_follow_the_policy():
    choices: dict[float, list[bool]] = {}
    rng = random.Random(1)
    for _ in range(4000):
        history = bandit.episode(rng, 4)
        p = round(bandit.policy(history[:3]), 3)
        choices.setdefault(p, []).append(history[3][0] == "A")
    for p, chosen in choices.items():
        assert abs(sum(chosen) / len(chosen) - p) < 0.06


def test_graphs_are_symmetric_and_walks_stay_on_them():
    rng = random.Random(2)
    for shape in graph.SHAPES:
        built = graph.build(shape, rng.sample(graph.WORDS, int(shape[-1])))
        assert all(a in built[b] for a in built for b in built[a])
        assert graph.share_of_valid_steps(built, graph.walk(rng, built, 50)) == 1.0
