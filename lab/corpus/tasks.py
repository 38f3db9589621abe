"""In-context tasks: word pairs under a template; only the examples tell which task is meant.

Sixteen tasks in three families that share their input words (nouns, verbs, adjectives), in four
templates. An item is (task, set of example words, query); held-out sets never occur in training.

A right intervention (a function vector) makes a zero-shot prompt get the task's output: `TASKS`
holds the truth, `zero_shot` and `few_shot` make the prompts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lab.corpus.sample import Sample, TestItem, answer, held_out, pick
from lab.corpus.task_tables import FAMILIES, TASKS

SKILL = "tasks"
# (input part, what stands between pairs); the output follows the input part after one space.
TEMPLATES: dict[str, tuple[str, str]] = {
    "arrow": ("{x} ->", "\n"),
    "question": ("Q: {x} A:", "\n"),
    "input": ("Input: {x}\nOutput:", "\n\n"),
    "is": ("{x} is to", ", "),
}
NAMES = list(TASKS)


def item_key(task: str, words: Sequence[str], query: str) -> str:
    return f"tasks:{task}:{','.join(sorted(words))}:{query}"


def _is_test(key: str) -> bool:
    return held_out(key, 0.05)


def few_shot(template: str, pairs: Sequence[tuple[str, str]], query: str) -> str:
    """The prompt: solved pairs, then the query. The right continuation is " " + output."""
    line, between = TEMPLATES[template]
    solved = "".join(f"{line.format(x=x)} {y}{between}" for x, y in pairs)
    return solved + line.format(x=query)


def zero_shot(template: str, query: str) -> str:
    """The query alone: the task is not determined."""
    return few_shot(template, (), query)


def train_sample(rng: random.Random) -> Sample:
    """A list of up to ten pairs of one task; no prefix of it is a held-out item."""
    task = pick(rng, NAMES)
    table = TASKS[task]
    line, between = TEMPLATES[pick(rng, list(TEMPLATES))]
    while True:
        words = rng.sample(list(table), rng.randint(4, 10))
        keys = tuple(item_key(task, words[:i], words[i]) for i in range(1, len(words)))
        if not any(_is_test(key) for key in keys):
            break
    text = between.join(line.format(x=x) + answer(" " + table[x]) for x in words)
    return Sample(SKILL, keys, text)


def test_items(n: int, seed: int = 0, shots: int = 5) -> list[TestItem]:
    """`shots`-shot prompts with held-out example sets, tasks and templates in turn."""
    rng = random.Random(f"tasks test {seed} {shots}")
    out = []
    for i in range(n):
        task = NAMES[i % len(NAMES)]
        template = list(TEMPLATES)[(i // len(NAMES)) % len(TEMPLATES)]
        table = TASKS[task]
        while True:
            *words, query = rng.sample(list(table), shots + 1)
            key = item_key(task, words, query)
            if shots == 0 or _is_test(key):
                break
        text = few_shot(template, [(x, table[x]) for x in words], query)
        out.append(TestItem(SKILL, key, text, " " + table[query], task,
                            {"template": template, "query": query, "shots": shots}))
    return out


def family_of(task: str) -> str:
    return next(name for name, members in FAMILIES.items() if task in members)


def tasks_answered(query: str, output: str) -> list[str]:
    """Every task under which `output` is right for `query` (a wrong answer has none)."""
    return [t for t, table in TASKS.items() if table.get(query) == output.strip()]
