"""Does a sentiment vector steer held-out reviews, and would any vector? Writes docs/sentiment.md and .json.

    python -m scripts.sentiment_table

Everything goes through the HTTP API of a server on lab-dense: the vector is made by POST /v1/extract from contrastive
reviews, layer and strength are chosen on dev openings, and the figures come from test openings that neither training,
extraction nor the choice has seen. The control: 20 random vectors of the same norm, at the same layer and strength.
"""

import asyncio
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from lab import datasets
from lab.corpus.sentiment import polarity
from scripts.running import running_server

DOCS = Path(__file__).parent.parent / "docs"
MODEL = "lab-dense"
MAX_TOKENS = 28
CONCURRENT = 48
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
NUM_RANDOM = 20
PER_OPENING_DEV, PER_OPENING_TEST = 1, 4
# Steer each prediction from the first one on: the last prompt token and everything generated.
SCOPE = {"prompt": {"positions": [-1]}, "generation": "all"}


@dataclass(frozen=True)
class Shares:
    """Shares of completions by polarity of their words."""

    positive: float
    negative: float
    mixed: float
    none: float
    number: int


class Reviews:
    """Completes neutral openings, steered by one intervention or not at all."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client
        self._gate = asyncio.Semaphore(CONCURRENT)

    async def shares(self, openings: list[str], repeats: int, intervention: dict[str, Any] | None) -> Shares:
        asked = [(opening, seed) for seed in range(repeats) for opening in openings]
        found = Counter(await asyncio.gather(*(self._one(*item, intervention) for item in asked)))
        return Shares(*(found[name] / len(asked) for name in ("positive", "negative", "mixed", "none")), len(asked))

    async def _one(self, opening: str, seed: int, intervention: dict[str, Any] | None) -> str:
        steering = {"interventions": [intervention] if intervention else []}
        async with self._gate:
            answer = await self._client.completions.create(
                model=MODEL, prompt=opening, max_tokens=MAX_TOKENS, temperature=1.0, seed=seed,
                extra_body={"steering": steering})
        return polarity(answer.choices[0].text)


async def extract(http: httpx.AsyncClient) -> dict[str, Any]:
    pairs = [{key: record[key] for key in ("positive", "negative", "item", "split")}
             for record in datasets.load("sentiment")]
    job = (await http.post("/v1/extract", json={
        "name": "sentiment", "method": "mean_difference", "token": "mean", "pairs": pairs,
        "description": "Positive rather than negative reviews."})).raise_for_status().json()
    while job["status"] in ("queued", "running"):
        await asyncio.sleep(0.2)
        job = (await http.get(f"/v1/jobs/{job['id']}")).raise_for_status().json()
    if job["status"] != "succeeded":
        raise RuntimeError(f"the extraction failed: {job}")
    return dict(job["result"])


def named(layer: int, strength: float) -> dict[str, Any]:
    return {"artifact": "sentiment@1", "layers": [layer], "scope": SCOPE,
            "strength": {"value": strength, "unit": "raw"}}


def drawn(seed: int, layer: int, norm: float, d_model: int) -> dict[str, Any]:
    """A random direction of the given norm."""
    rng = random.Random(f"random vector {seed}")
    values = [rng.gauss(0, 1) for _ in range(d_model)]
    length = math.sqrt(sum(v * v for v in values))
    return {"op": "add", "inline": {"vector": [v * norm / length for v in values]}, "layers": [layer], "scope": SCOPE}


async def choose(reviews: Reviews, openings: list[str], layers: list[int]) -> list[dict[str, Any]]:
    """Dev figures of the grid, best first: the weaker of the two directions decides, then the weaker strength."""
    rows = []
    for layer in layers:
        for strength in STRENGTHS:
            up = await reviews.shares(openings, PER_OPENING_DEV, named(layer, strength))
            down = await reviews.shares(openings, PER_OPENING_DEV, named(layer, -strength))
            rows.append({"layer": layer, "strength": strength, "up": up.positive, "down": down.negative})
    return sorted(rows, key=lambda row: (-min(row["up"], row["down"]), row["strength"]))


async def measure() -> dict[str, Any]:
    async with (running_server(MODEL, slots=64, slot_wait_s=600) as url,
                httpx.AsyncClient(base_url=url, timeout=600) as http,
                AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=600) as client):
        result = await extract(http)
        facts = (await http.get("/v1/capabilities")).json()
        artifact = (await http.get("/v1/artifacts/sentiment")).json()
        reviews = Reviews(client)
        dev = sorted({r["text"] for r in datasets.load("sentiment_neutral", "dev")})
        test = sorted({r["text"] for r in datasets.load("sentiment_neutral", "test")})
        grid = await choose(reviews, dev, list(range(facts["num_layers"])))
        layer, strength = grid[0]["layer"], grid[0]["strength"]
        norm = strength * result["report"]["layers"][str(layer)]["norm"]
        found = {
            "unsteered": await reviews.shares(test, PER_OPENING_TEST, None),
            "up": await reviews.shares(test, PER_OPENING_TEST, named(layer, strength)),
            "down": await reviews.shares(test, PER_OPENING_TEST, named(layer, -strength)),
        }
        controls = [await reviews.shares(test, PER_OPENING_TEST, drawn(seed, layer, norm, facts["d_model"]))
                    for seed in range(NUM_RANDOM)]
    return {"model": MODEL, "fingerprint": facts["fingerprint"], "artifact": artifact["name"], "layer": layer,
            "strength": strength, "norm": norm, "test_openings": len(test), "dev_openings": len(dev),
            "steered": {name: vars(shares) for name, shares in found.items()},
            "random": [vars(shares) for shares in controls], "dev_grid": grid}


def table(found: dict[str, Any]) -> str:
    def row(name: str, s: dict[str, Any]) -> str:
        return (f"| {name} | {s['positive']:.1%} | {s['negative']:.1%} | {s['mixed']:.1%} | {s['none']:.1%} "
                f"| {s['number']} |")

    randoms = found["random"]

    def spread(key: str) -> str:
        values = sorted(s[key] for s in randoms)
        return f"{values[0]:.1%} to {values[-1]:.1%} (median {values[len(values) // 2]:.1%})"

    steered = found["steered"]
    most_up = max(s["positive"] for s in randoms)
    most_down = max(s["negative"] for s in randoms)
    verdict = ("The vector moves the openings over 90 % in both directions and no random vector comes near."
               if min(steered["up"]["positive"], steered["down"]["negative"]) > 0.9 and max(most_up, most_down) < 0.8
               else "The bar (over 90 % in both directions, random vectors far below) is not met.")
    return "\n".join([
        "# A sentiment vector against random vectors", "",
        "Made by `python -m scripts.sentiment_table`; do not edit by hand. All figures in `sentiment.json`.", "",
        f"Model {found['model']} (fingerprint `{found['fingerprint'][:12]}`). Vector: mean difference of contrastive "
        f"reviews, read as the mean over tokens. Chosen on {found['dev_openings']} dev openings: layer "
        f"{found['layer']}, strength {found['strength']:g} (norm {found['norm']:.2f}). Figures: "
        f"{found['test_openings']} neutral openings of the test split, {PER_OPENING_TEST} completions each at "
        f"temperature 1, judged by which polar words they contain.", "",
        "| steering | positive | negative | mixed | no polar word | completions |", "|---|---|---|---|---|---|",
        row("none", steered["unsteered"]), row(f"sentiment, +{found['strength']:g}", steered["up"]),
        row(f"sentiment, -{found['strength']:g}", steered["down"]),
        f"| {len(randoms)} random vectors of the same norm | {spread('positive')} | {spread('negative')} "
        f"| {spread('mixed')} | {spread('none')} | {randoms[0]['number']} each |", "", verdict, ""])


if __name__ == "__main__":
    outcome = asyncio.run(measure())
    (DOCS / "sentiment.json").write_text(json.dumps(outcome, indent=1) + "\n")
    (DOCS / "sentiment.md").write_text(table(outcome))
    print(table(outcome))
