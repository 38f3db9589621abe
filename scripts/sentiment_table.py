"""Does the bundled sentiment vector steer held-out reviews, and would any vector? Writes docs/sentiment.md and .json.

    python -m scripts.sentiment_table

Through the HTTP API of a server on lab-dense. The vector, its layer and its strength are those of the bundled artifact
`cheerful`: made by POST /v1/extract and chosen on dev openings by `scripts.bundled_library`. The figures come from test
openings that neither training, extraction nor the choice has seen. The control: 20 random vectors of the same norm, at
the same layer, on the same tokens.
"""

import asyncio
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab_client import AsyncClient

from lab import datasets
from lab.corpus.sentiment import polarity
from scripts.bundled_library import FOLDER, random_like
from scripts.running import running_server
from server.observability.logs import configure_logging
from vectors.artifact import Limits
from vectors.formats import get_format

DOCS = Path(__file__).parent.parent / "docs"
MODEL = "lab-dense"
MAX_TOKENS = 28
CONCURRENT = 48
NUM_RANDOM = 20
PER_OPENING = 4
KEYS = ("positive", "negative", "mixed", "none")


@dataclass(frozen=True)
class Shares:
    """Shares of completions by the polarity of their words."""

    positive: float
    negative: float
    mixed: float
    none: float


async def shares(client: AsyncClient, openings: list[str], intervention: dict[str, Any] | None) -> Shares:
    gate = asyncio.Semaphore(CONCURRENT)
    steering = {"interventions": [intervention] if intervention else []}

    async def one(opening: str, seed: int) -> str:
        async with gate:
            answer = await client.complete(opening, model=MODEL, steering=steering, max_tokens=MAX_TOKENS,
                                           temperature=1.0, seed=seed)
        return polarity(answer.text)

    # A seed of its own for each completion: draws depend on seed and place only, so equal seeds would go together.
    asked = [(opening, PER_OPENING * i + k) for i, opening in enumerate(openings) for k in range(PER_OPENING)]
    found = Counter(await asyncio.gather(*(one(*item) for item in asked)))
    return Shares(*(found[name] / len(asked) for name in KEYS))


async def measure() -> dict[str, Any]:
    openings = sorted({record["text"] for record in datasets.load("sentiment_neutral", "test")})
    async with running_server(MODEL, slots=64, slot_wait_s=600) as url, AsyncClient(url) as client:
        file = (FOLDER / "cheerful.safetensors").read_bytes()
        artifact = await client.import_artifact(file)
        facts = await client.capabilities()
        metadata, payload = get_format("safetensors").read(file, {}, Limits())
        card = metadata.card or {}
        layer, strength = card["layer"], card["strength"]
        norm = strength * float(payload.layers[layer]["vector"].norm())
        chosen = {"artifact": artifact.ref, "layers": [layer]}
        up = {**chosen, "strength": {"value": strength, "unit": "raw"}}
        down = {**chosen, "strength": {"value": -strength, "unit": "raw"}}
        return {
            "model": MODEL, "fingerprint": facts["fingerprint"], "layer": layer, "strength": strength, "norm": norm,
            "openings": len(openings), "completions": len(openings) * PER_OPENING,
            "unsteered": asdict(await shares(client, openings, None)),
            "up": asdict(await shares(client, openings, up)), "down": asdict(await shares(client, openings, down)),
            "random": [asdict(await shares(client, openings, random_like(up, seed, norm, facts["d_model"])))
                       for seed in range(NUM_RANDOM)]}


def table(found: dict[str, Any]) -> str:
    def row(name: str, share: dict[str, float]) -> str:
        return f"| {name} | " + " | ".join(f"{share[key]:.1%}" for key in KEYS) + " |"

    def spread(key: str) -> str:
        values = sorted(share[key] for share in found["random"])
        return f"{values[0]:.1%} to {values[-1]:.1%}, median {values[len(values) // 2]:.1%}"

    furthest = max(max(share["positive"] for share in found["random"]),
                   max(share["negative"] for share in found["random"]))
    met = min(found["up"]["positive"], found["down"]["negative"]) > 0.9 and furthest < 0.8
    return "\n".join([
        "# The sentiment vector against random vectors", "",
        "Made by `python -m scripts.sentiment_table`; do not edit by hand. All figures are in `sentiment.json`.", "",
        f"Model {found['model']} (`{found['fingerprint'][:12]}`), artifact `cheerful`, layer {found['layer']}, "
        f"strength {found['strength']:g} raw (norm {found['norm']:.1f}). {found['openings']} neutral review openings "
        f"of the test split, {PER_OPENING} completions each at temperature 1 ({found['completions']} a row), judged by "
        "the polar words they contain.", "",
        "| steering | positive | negative | mixed | no polar word |", "|---|---|---|---|---|",
        row("none", found["unsteered"]), row(f"cheerful, +{found['strength']:g}", found["up"]),
        row(f"cheerful, -{found['strength']:g}", found["down"]),
        f"| {NUM_RANDOM} random vectors of that norm | " + " | ".join(
            spread(key) for key in KEYS) + " |", "",
        "The vector moves the openings over 90 % in both directions; no random vector comes near." if met else
        "The bar (over 90 % in both directions, random vectors under 80 %) is not met.", ""])


if __name__ == "__main__":
    configure_logging("console")
    outcome = asyncio.run(measure())
    (DOCS / "sentiment.json").write_text(json.dumps(outcome, indent=1) + "\n")
    (DOCS / "sentiment.md").write_text(table(outcome))
    print(table(outcome))
