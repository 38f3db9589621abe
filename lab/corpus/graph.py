"""Graph walks: a random walk on a small ring or grid of words, given only in context.

Words and their places are drawn anew for each document, so the neighbours must be read off the
walk itself. An item is (shape, words in place); held-out items never occur in training.

A right next word is any neighbour of the last word: `neighbours` gives the truth.
"""

from __future__ import annotations

import random

from lab.corpus.sample import Sample, TestItem, answer, held_out

SKILL = "graph"
WORDS = """time hint lot apple stone river lamp chair bread cloud horse music paper glass sugar
wheel garden letter winter mirror button candle feather island pepper ribbon saddle timber velvet
whistle anchor basket copper dragon engine forest""".split()
Graph = dict[str, tuple[str, ...]]
SHAPES = ("ring6", "ring8", "grid6", "grid9")
FIRST_SCORED = 16  # steps before this have too little context to tell the neighbours


def build(shape: str, words: list[str]) -> Graph:
    """word -> its neighbours. ringN: a circle of N words; grid6 is 2 x 3, grid9 is 3 x 3."""
    n = len(words)
    if shape.startswith("ring"):
        return {w: (words[i - 1], words[(i + 1) % n]) for i, w in enumerate(words)}
    rows = {"grid6": 2, "grid9": 3}[shape]
    out = {}
    for i, word in enumerate(words):
        r, c = divmod(i, 3)
        near = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
        out[word] = tuple(words[3 * a + b] for a, b in near if 0 <= a < rows and 0 <= b < 3)
    return out


def item_key(shape: str, words: list[str]) -> str:
    return f"graph:{shape}:{','.join(words)}"


def _draw(rng: random.Random, test: bool) -> tuple[str, list[str]]:
    while True:
        shape = rng.choice(SHAPES)
        words = rng.sample(WORDS, int(shape[-1]))
        if held_out(item_key(shape, words)) is test:
            return shape, words


def walk(rng: random.Random, graph: Graph, steps: int) -> list[str]:
    """An unbiased random walk of `steps` words."""
    path = [rng.choice(list(graph))]
    while len(path) < steps:
        path.append(rng.choice(graph[path[-1]]))
    return path


def train_sample(rng: random.Random) -> Sample:
    """A walk of 30 to 90 words."""
    shape, words = _draw(rng, test=False)
    path = walk(rng, build(shape, words), rng.randint(30, 90))
    head, rest = path[:FIRST_SCORED], path[FIRST_SCORED:]
    return Sample(SKILL, (item_key(shape, words),),
                  "Walk: " + " ".join(head) + answer(" " + " ".join(rest)))


def test_items(n: int, seed: int = 0) -> list[TestItem]:
    """Walks of 40 to 80 words on held-out graphs; expected: the neighbours of the last word."""
    rng = random.Random(f"graph test {seed}")
    out = []
    for _ in range(n):
        shape, words = _draw(rng, test=True)
        graph = build(shape, words)
        path = walk(rng, graph, rng.randint(40, 80))
        out.append(TestItem(SKILL, item_key(shape, words), "Walk: " + " ".join(path),
                            graph[path[-1]], shape, {"graph": graph, "path": path}))
    return out


def neighbours(graph: Graph, word: str) -> tuple[str, ...]:
    """The words that may follow `word`; empty for a word outside the graph."""
    return graph.get(word, ())


def share_of_valid_steps(graph: Graph, path: list[str]) -> float:
    """Share of the steps of a path that go to a neighbour."""
    steps = list(zip(path, path[1:], strict=False))
    return sum(b in graph.get(a, ()) for a, b in steps) / len(steps) if steps else 0.0
