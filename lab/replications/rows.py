"""The rows: which recipe on which data, and which figures of its report stand for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lab.corpus import calendar
from lab.datasets import load
from lab.replications.common import Fields, Row
from vectors.extract.local import LocalSubject

TASKS = ("plural", "noun_to_french", "noun_to_german", "past", "gerund", "third_person", "opposite", "comparative")
REFUSES = [" I", "I", " Sorry", "Sorry"]
Headline = list[tuple[str, dict[str, Any]]]


def _controls(*paths: str) -> Callable[[dict[str, Any]], Headline]:
    def headline(report: dict[str, Any]) -> Headline:
        found: Headline = []
        for path in paths:
            value: Any = report
            for key in path.split("."):
                value = value[key]
            found.append((path, value))
        return found

    return headline


def _tasks(extraction: str) -> Callable[[LocalSubject], Iterator[tuple[str, Fields]]]:
    def cases(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
        pairs_of = {task: [{"input": p["input"], "output": p["output"], "split": p["split"]}
                           for p in load("task_pairs") if p["task"] == task] for task in TASKS}
        for n, task in enumerate(TASKS):
            # The next task but one: a neighbour may have the same inputs, as the two languages do.
            yield f"fv-{task.replace('_', '-')}", {
                "extraction": extraction, "shots": 5, "num_prompts": 15 if extraction == "mean_difference" else 40,
                "pairs": pairs_of[task], "other_pairs": pairs_of[TASKS[(n + 2) % len(TASKS)]]}

    return cases


def _categories(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    pairs, relations = load("task_pairs"), load("relations")
    words: dict[str, list[str]] = {
        "nouns": [" " + p["input"] for p in pairs if p["task"] == "plural"],
        "plurals": [p["output"] for p in pairs if p["task"] == "plural"],
        "french-nouns": [p["output"] for p in pairs if p["task"] == "noun_to_french"],
        "spanish-nouns": [p["output"] for p in pairs if p["task"] == "noun_to_spanish"],
        "german-nouns": [p["output"] for p in pairs if p["task"] == "noun_to_german"],
        "past-verbs": [p["output"] for p in pairs if p["task"] == "past"],
        "gerunds": [p["output"] for p in pairs if p["task"] == "gerund"],
        "third-person-verbs": [p["output"] for p in pairs if p["task"] == "third_person"],
        "comparatives": [p["output"] for p in pairs if p["task"] == "comparative"],
        "adjectives": [" " + p["input"] for p in pairs if p["task"] == "comparative"],
        "superlatives": [p["output"] for p in pairs if p["task"] == "superlative"],
        "months": [" " + month for month in calendar.MONTHS],
        **{f"{label}s": [r["answer"] for r in relations if r["label"] == label]
           for label in ("capital", "job", "town")}}
    for name, texts in words.items():
        single = [text for text in dict.fromkeys(texts) if len(subject.encode_continuation(text)) == 1]
        if len(single) >= 12:
            yield f"signs-{name}", {"anchors": single, "min_auc": 0.65}


def _behaviours(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    chat = [{"text": r["text"], "label": r["label"], "item": r["item"], "split": r["split"]}
            for r in load("harmful_harmless")]
    yield "experts-refusal", {"examples": chat, "target": "harmful", "num_experts": 4}
    languages = [{"text": r["text"], "label": r["label"], "item": r["item"], "split": r["split"]}
                 for r in load("languages")]
    yield "experts-french", {"examples": languages, "target": "french", "num_experts": 4}


def _relations(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    known = [{"text": r["text"], "answer": r["answer"], "label": r["label"], "item": r["item"], "split": r["split"]}
             for r in load("relations") if not r["held_out"]]
    for relation in ("capital", "currency", "job", "pet"):
        yield f"neurons-{relation}", {"facts": known, "target": relation, "share": 0.2}


def _pairs(name: str) -> list[Fields]:
    return [{key: r[key] for key in ("positive", "negative", "item", "split")} for r in load(name)]


def _shifts(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    yield "heads-refusal", {"pairs": _pairs("refusal"), "share": 0.15, "strength": 4.0,
                            "readout": {"target": REFUSES}}
    yield "heads-sentiment", {"pairs": _pairs("sentiment"), "share": 0.15, "strength": 4.0}


def _answers(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    shots = [{"text": r["text"], "answer": r["answer"], "item": r["item"], "split": r["split"]}
             for r in load("task_prompts") if r["shots"] == 5]
    yield "heads-in-context", {"examples": shots, "num_heads": 3, "max_eval": 80}


def _agent(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    yield "explore", {"prompts": [{"text": r["text"], "episode": r["item"], "step": r["step"], "split": r["split"]}
                                  for r in load("bandit")], "actions": [" A", " B"], "center": "step", "max_eval": 60}


def _skills(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    texts = [{"text": r["text"], "label": "foreign", "item": r["item"], "split": r["split"]}
             for r in load("languages") if r["label"] == "french"]
    for name, label in (("sentiment", "review"), ("tense", "story"), ("bandit", "bandit"), ("graph_walks", "walk")):
        for r in load(name)[:90]:
            texts.append({"text": r.get("text", r.get("positive")), "label": label, "item": f"{label}:{r['item']}",
                          "split": r["split"]})
    yield "skills", {"sequences": texts, "rank": 8}


def _concepts(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    for name in ("sentiment", "tense", "emotions", "language_french"):
        yield f"aligned-{name.replace('_', '-')}", {"pairs": _pairs(name)}


def _refusal(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    # Harmless requests have six ways to begin an answer, between which the model wavers: no candidate of the last token
    # keeps within the paper's 0.1 nats.
    yield "refusal-direction", {"pairs": _pairs("refusal"), "readout": {"target": REFUSES}, "num_positions": 1,
                                "max_kl": 0.3}


def _conditions(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    chat = [{key: r[key] for key in ("text", "label", "item", "split")} for r in load("harmful_harmless")]
    for form in ("linear", "cast"):
        for pool in ("last", "mean"):
            yield f"gate-harmful-{form}-{pool}", {"examples": chat, "target": "harmful", "form": form, "pool": pool}


def _own_text(subject: LocalSubject) -> Iterator[tuple[str, Fields]]:
    texts = [r["text"] for name in ("neutral", "harmful_harmless", "languages", "task_prompts", "relations")
             for r in load(name)[:80]]
    yield "tuned-lens", {"prompts": list(dict.fromkeys(texts))}


ROWS = (
    Row("function-vectors", "function_vector", "lab-dense",
        "a vector from few-shot prompts makes the model do the task on bare queries", _tasks("mean_difference"),
        _controls("test", "controls.random_vectors", "controls.shuffled_demonstrations", "controls.other_task")),
    Row("function-vectors-causal", "function_vector", "lab-dense",
        "so does the summed output of the heads that cause the answer", _tasks("causal_mediation"),
        _controls("test", "controls.random_vectors", "controls.shuffled_demonstrations", "controls.other_task")),
    Row("sign-patterns", "sign_pattern", "lab-dense",
        "signs of single dims tell a category's tokens from the vocabulary", _categories,
        _controls("controls.random_anchors")),
    Row("tunable-experts", "tunable_experts", "lab-moe", "a few experts are used more where a behaviour shows",
        _behaviours, _controls("test", "controls.matched_random", "controls.matched_random_auc",
                               "controls.shuffled_labels")),
    Row("relation-neurons", "relation_neurons", "lab-dense",
        "switching a relation's neurons off costs that relation's facts, not the others'", _relations,
        _controls("test", "controls.matched_random", "controls.shuffled_labels", "effect")),
    Row("head-shift", "head_shift", "lab-dense", "shifting the heads that a probe reads moves the behaviour", _shifts,
        lambda report: _controls("test", "controls.random_heads", "controls.shuffled_labels")(report)
        + ([("effect", report["effect"])] if "effect" in report else [])),
    Row("head-ablation", "head_ablation", "lab-dense", "a few heads carry in-context answers", _answers,
        _controls("test", "controls.random_heads")),
    Row("entropic-steering", "entropic_steering", "lab-dense", "a vector raises the entropy of an agent's actions",
        _agent, _controls("test", "controls.entropy_gain", "controls.reading")),
    Row("native-skills", "native_skills", "lab-dense", "orthogonal axes of whole sequences are skills", _skills,
        _controls("labels", "controls", "split_half_cosines")),
    Row("aligned-concepts", "aligned_concept", "lab-dense", "aligned across layers, a concept's scores agree more",
        _concepts, _controls("before", "after", "controls")),
    Row("refusal-direction", "refusal_direction", "lab-dense", "ablating one direction stops refusals",
        _refusal, _controls("test", "controls")),
    Row("conditional-gates", "condition", "lab-dense", "a probe of the prompt tells when to steer", _conditions,
        _controls("test", "controls.shuffled_labels", "controls.random_directions",
                  "controls.random_from_covariance", "controls.bag_of_tokens")),
    Row("tuned-lens", "tuned_lens", "lab-dense", "a scale and shift per dim make earlier layers readable", _own_text,
        _controls("mean_kl_gain", "controls.dealt_dims")),
)
