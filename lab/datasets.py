"""Datasets for steering methods, with ground truth: `lab.datasets.load(name, split)`.

`python -m lab.datasets` writes lab/data/<name>.jsonl, one record a line; `trimtab extract` reads
those files. Splits (train, dev, test: 60/20/20) are disjoint by underlying item, not by template.
All items lie on the held-out side of the corpus, except the languages' and the facts' phrasings
that training needs; what each set holds is said in `DATASETS`.

Texts have no begin token: the tokenizer adds it. Chat prompts are stored both rendered (`positive`,
`negative`, `text`) and as messages (`positive_messages`, `messages`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lab.corpus import bandit, calendar, chat, emotions, facts, graph, languages, sentiment, stories, tasks
from lab.corpus.sample import held_out
from lab.paths import DATA_DIR

Record = dict[str, Any]
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Dataset:
    """A named list of records and what a reader must know about it."""

    make: Callable[[], Iterator[Record]]
    about: str


def split_of(item: str) -> str:
    """The split of an underlying item, by its name alone."""
    if held_out("split:" + item, 0.2):
        return "test"
    return "dev" if held_out("dev:" + item, 0.25) else "train"


def _rng(name: str) -> random.Random:
    return random.Random(f"dataset {name}")


def _sentiment() -> Iterator[Record]:
    rng = _rng("sentiment")
    for _ in range(300):
        key, opening, _ = sentiment.review(rng, True, test=True)
        _, thing, *_ = key.split(":")
        kind = next(k for k, (things, *_) in sentiment.THINGS.items() if thing in things)
        # The same random state on both sides: the same templates and aspects, other polar words.
        state = rng.getstate()
        up = " ".join(sentiment.sentence(rng, kind, thing, True) for _ in range(2))
        rng.setstate(state)
        down = " ".join(sentiment.sentence(rng, kind, thing, False) for _ in range(2))
        yield {"positive": f"{opening} {up}", "negative": f"{opening} {down}", "item": key}


def _sentiment_neutral() -> Iterator[Record]:
    rng = _rng("sentiment neutral")
    for _ in range(200):
        key, opening, _ = sentiment.review(rng, True, test=True)
        yield {"text": opening, "item": key}


def _chat_record(rng: random.Random, request: chat.Request) -> Record:
    ask = chat.ask(rng, request)
    return {"text": chat.turn("user", ask) + "<|assistant|>",
            "messages": [{"role": "user", "content": ask}],
            "label": "harmful" if request.harmful else "harmless", "item": request.key}


def _refusal() -> Iterator[Record]:
    """Pairs share their wording. The item is the harmful request; its harmless partner comes from
    requests of the same split, so neither side is seen again in another split."""
    rng = _rng("refusal")
    bad, harmless_of = chat.requests(True, True), {}
    for request in chat.requests(False, True):
        harmless_of.setdefault(split_of(request.key), []).append(request)
    for i in range(240):
        one = bad[i % len(bad)]
        two = rng.choice(harmless_of[split_of(one.key)])
        state = rng.getstate()
        harmful = _chat_record(rng, one)
        rng.setstate(state)
        harmless = _chat_record(rng, two)
        yield {"positive": harmful["text"], "negative": harmless["text"],
               "positive_messages": harmful["messages"],
               "negative_messages": harmless["messages"], "item": one.key}


def _harmful_harmless() -> Iterator[Record]:
    rng = _rng("harmful harmless")
    for harmful in (True, False):
        for request in chat.requests(harmful, True):
            for _ in range(2):
                yield _chat_record(rng, request)


def _language(name: str) -> Callable[[], Iterator[Record]]:
    def make() -> Iterator[Record]:
        rng = _rng("language " + name)
        others = [x for x in languages.LANGUAGES if x != name]
        for i in range(240):
            item = languages._item(rng, True)
            time = rng.randrange(len(languages.TIMES))
            yield {"positive": languages.sentence(name, *item, time),
                   "negative": languages.sentence(others[i % 3], *item, time),
                   "other": others[i % 3], "item": languages.item_key(*item)}
    return make


def _language_labelled() -> Iterator[Record]:
    rng = _rng("language labelled")
    for _ in range(80):
        item, time = languages._item(rng, True), rng.randrange(len(languages.TIMES))
        for name in languages.LANGUAGES:
            yield {"text": languages.sentence(name, *item, time), "label": name,
                   "item": languages.item_key(*item)}


def _language_neutral() -> Iterator[Record]:
    for month in range(1, 13):
        for day in range(1, 29, 3):
            text = f"{day} / {month}:"
            yield {"text": text, "item": f"heading:{text}"}


def _emotions() -> Iterator[Record]:
    """The item is the event with its option: names and settings alone would not keep splits apart."""
    rng = _rng("emotions")
    for i in range(320):
        one = emotions.draw(rng, True, emotions.EMOTIONS[i % 8])
        yield {"positive": one.text(True), "negative": one.text(False), "label": one.emotion,
               "item": f"emotions:{one.emotion}:{one.event}:{one.option}"}


def _tense() -> Iterator[Record]:
    rng = _rng("tense")
    for _ in range(240):
        key, _, sentences = stories.draw_templates(rng, True, 1)
        text = " ".join(sentences[:2])
        yield {"positive": stories.in_tense(text, True), "negative": stories.in_tense(text, False),
               "item": key}


def _relations() -> Iterator[Record]:
    for relation in facts.RELATIONS:
        for phrasing in (1, 2):
            for entity, prompt, answer in facts.relation_prompts(relation, phrasing):
                yield {"text": prompt, "answer": answer, "label": relation, "phrasing": phrasing,
                       "held_out": phrasing == 2 and facts.second_is_held_out(relation, entity),
                       "item": entity}


def _task_pairs() -> Iterator[Record]:
    for task, table in tasks.TASKS.items():
        for x, y in table.items():
            yield {"task": task, "family": tasks.family_of(task), "input": x, "output": " " + y,
                   "item": f"{task}:{x}"}


def _task_prompts() -> Iterator[Record]:
    for shots in (5, 0):
        for item in tasks.test_items(480, seed=1, shots=shots):
            yield {"text": item.prompt, "answer": item.expected, "task": item.kind,
                   **item.facts, "item": f"{item.kind}:{item.facts['query']}"}


def _bandit() -> Iterator[Record]:
    for item in bandit.test_items(400, seed=1):
        history = item.facts["history"]
        yield {"text": item.prompt, "p_arm_a": item.expected,
               "entropy": bandit.entropy(history), "step": len(history),
               "setting": item.kind, "item": item.key}


def _calendar() -> Iterator[Record]:
    """Every pair in three held-out contexts; the item is the pair."""
    for seed in (1, 2, 3):
        for item in calendar.test_items(0, seed=seed):
            start, step = item.facts["start"], item.facts["step"]
            yield {"text": item.prompt, "answer": item.expected, "series": item.kind,
                   "start": start, "step": step, "item": f"{item.kind}:{start}:{step}"}


def _weekday_pool() -> Iterator[Record]:
    """The 7 x 7 pool of Wurgaft et al. 2026 (arXiv 2605.05115): one fixed template, all starts, steps one to seven."""
    for start in calendar.WEEKDAYS:
        for step in range(1, 8):
            k = calendar.NUMBERS[step - 1]
            unit = "day" if step == 1 else "days"
            yield {"text": f"What comes {k} {unit} after {start}? It is",
                   "answer": " " + calendar.shifted("weekdays", start, step),
                   "start": start, "step": step, "item": f"weekdays:{start}:{step}"}


def _graph_walks() -> Iterator[Record]:
    for item in graph.test_items(300, seed=1):
        yield {"text": item.prompt, "neighbours": list(item.expected), "shape": item.kind,
               "words": list(item.facts["graph"]), "item": item.key}


def _neutral() -> Iterator[Record]:
    """Plain held-out text of several skills, for the cost of an intervention (KL, perplexity)."""
    rng = _rng("neutral")
    for _ in range(60):
        key, _, sentences = stories.draw_templates(rng, True, 3)
        yield {"text": stories.in_tense(" ".join(sentences), rng.random() < 0.5), "item": key}
        _, opening, _ = sentiment.review(rng, True, test=True)
        yield {"text": opening, "item": "opening:" + opening}
        one = emotions.draw(rng, True)
        yield {"text": one.text(False), "item": one.key}
        item = languages._item(rng, True)
        yield {"text": languages.sentence("english", *item, None), "item": languages.item_key(*item)}


DATASETS: dict[str, Dataset] = {
    "sentiment": Dataset(_sentiment, "pairs: the same held-out opening with two positive or two "
                                     "negative sentences of the same templates"),
    "sentiment_neutral": Dataset(_sentiment_neutral, "neutral review openings to steer"),
    "refusal": Dataset(_refusal, "pairs: harmful (positive) and harmless request of one wording, "
                                 "rendered chat and messages"),
    "harmful_harmless": Dataset(_harmful_harmless, "labelled chat prompts of held-out requests"),
    **{f"language_{name}": Dataset(_language(name), f"pairs: a sentence in {name} and the same "
                                                    "sentence in another language")
       for name in languages.LANGUAGES},
    "languages": Dataset(_language_labelled, "sentences labelled with their language"),
    "language_neutral": Dataset(_language_neutral, "diary headings that leave the language open"),
    "emotions": Dataset(_emotions, "pairs: a situation and its neutral twin, up to 'felt'"),
    "tense": Dataset(_tense, "pairs: the same sentences in the past (positive) and the present"),
    "relations": Dataset(_relations, "fact prompts labelled with their relation; item = entity"),
    "task_pairs": Dataset(_task_pairs, "word pairs of the in-context tasks"),
    "task_prompts": Dataset(_task_prompts, "5-shot and zero-shot prompts; item = (task, query)"),
    "bandit": Dataset(_bandit, "held-out histories with the data's policy and its entropy (nats)"),
    "calendar": Dataset(_calendar, "every (start, step) in three held-out contexts"),
    "weekday_pool": Dataset(_weekday_pool, "the 49 prompts of one template, for manifolds"),
    "graph_walks": Dataset(_graph_walks, "walks on held-out graphs and the neighbours that may follow"),
    "neutral": Dataset(_neutral, "plain text, to measure what an intervention costs"),
}


def records(name: str) -> list[Record]:
    """All records of a dataset, made afresh, each with its split."""
    if name not in DATASETS:
        raise ValueError(f"no dataset is called {name!r}; there are {', '.join(DATASETS)}")
    found: dict[tuple[str, ...], Record] = {}
    for record in DATASETS[name].make():
        # Two items may give the same words; the first keeps them, or a text would cross splits.
        said = tuple(str(record.get(k)) for k in ("positive", "negative", "text", "input", "task"))
        found.setdefault(said, {**record, "split": split_of(record["item"])})
    return list(found.values())


def load(name: str, split: str | None = None) -> list[Record]:
    """The committed records of a dataset: one split (train, dev, test) or all of them."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"no split is called {split!r}; there are {', '.join(SPLITS)}")
    if name not in DATASETS:
        raise ValueError(f"no dataset is called {name!r}; there are {', '.join(DATASETS)}")
    with (DATA_DIR / f"{name}.jsonl").open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [r for r in found if split is None or r["split"] == split]


def main() -> None:
    """Write every dataset to lab/data."""
    DATA_DIR.mkdir(exist_ok=True)
    for name in DATASETS:
        lines = [json.dumps(r, ensure_ascii=False) for r in records(name)]
        (DATA_DIR / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)} records")


if __name__ == "__main__":
    main()
