"""Which skills the corpus has and how often each is drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator

from lab.corpus import (
    bandit,
    calendar,
    chat,
    copying,
    emotions,
    facts,
    graph,
    languages,
    sentiment,
    stories,
    tasks,
    tool_calls,
)
from lab.corpus.sample import Sample

SKILLS = {
    m.SKILL: m
    for m in (chat, sentiment, calendar, tasks, facts, languages, emotions, bandit, graph, stories)
}

# What a mix may draw from: every skill, single parts of a skill that need more practice, and what lab-tools learns.
SOURCES = {name: m.train_sample for name, m in SKILLS.items()} | {
    "dates": calendar.dates_sample, tool_calls.SKILL: tool_calls.train_sample,
    copying.SKILL: copying.train_sample, "one_call": tool_calls.one_call_sample}

# Share of documents per skill: calendar and tasks are learned last, so they get the most.
MIX = {
    "chat": 14.0, "sentiment": 12.0, "calendar": 24.0, "tasks": 20.0, "facts": 12.0,
    "languages": 7.0, "emotions": 9.0, "bandit": 6.0, "graph": 7.0, "stories": 6.0,
}
# What lab-tools learns, in this order.
COPYING_MIX = {copying.SKILL: 1.0}
ONE_CALL_MIX = {copying.SKILL: 1.0, "one_call": 3.0}
TOOLS_MIX = {tool_calls.SKILL: 4.0, "one_call": 1.0}


def documents(seed: int | str, mix: dict[str, float] | None = None) -> Iterator[Sample]:
    """An endless stream of training documents, the same for the same seed."""
    rng = random.Random(f"corpus {seed}")
    shares = mix or MIX
    names, weights = list(shares), list(shares.values())
    while True:
        for name in rng.choices(names, weights, k=256):
            yield SOURCES[name](rng)
