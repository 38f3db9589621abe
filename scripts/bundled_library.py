"""Makes the example artifacts of the bundled models: `python -m scripts.bundled_library [NAME...]`.

The directions of scripts.examples first. Everything goes through the HTTP API of a server on lab-dense, as a user would
do it: POST /v1/extract takes each direction from contrastive pairs; layer and strength are chosen by their effect on
dev prompts; the card holds the effect on test prompts, the unsteered figure, and that of 20 random vectors of the same
norm. Then the artifacts of scripts.bundled_recipes, whose recipes choose and measure for themselves. The files go to
lab/artifacts/MODEL.
"""

import asyncio
import json
import random
import sys
from dataclasses import dataclass
from typing import Any

from trimtab_client import AsyncClient, Completion

from lab.paths import LAB_DIR
from scripts import bundled_recipes
from scripts.examples import EXAMPLES, PRESETS, Example
from scripts.running import running_server
from server.observability.logs import configure_logging
from steering.language.strength import Strength
from vectors.artifact import Limits
from vectors.formats import get_format

MODEL = "lab-dense"
FOLDER = LAB_DIR / "artifacts" / MODEL
MAX_TOKENS = 28
CONCURRENT = 48
STRENGTHS = (1.0, 2.0, 3.0, 4.5, 6.0, 8.0, 10.0)
MAX_DEV_PROMPTS, MAX_TEST_PROMPTS = 40, 64
NUM_RANDOM = 20
# An ablation may cost at most this share of the answers that must stay as they are.
MAX_COST = 0.05
# Of all interventions with at least this effect on dev, the one whose text the untouched model finds least surprising.
BAR = 0.95


@dataclass(frozen=True)
class Candidate:
    """An intervention and its effect on dev prompts."""

    layer: int
    strength: float
    effect: float


class Judge:
    """Asks the server and counts the answers that are as they should be."""

    def __init__(self, client: AsyncClient, example: Example) -> None:
        self._client = client
        self._example = example
        self._gate = asyncio.Semaphore(CONCURRENT)

    async def share(self, prompts: list[Any], target: str, intervention: dict[str, Any] | None) -> float:
        answers = await asyncio.gather(*(self._ask(prompt, n, intervention) for n, prompt in enumerate(prompts)))
        return sum(self._example.judge(answer.text) == target for answer in answers) / len(answers)

    async def surprise(self, prompts: list[Any], intervention: dict[str, Any]) -> float:
        """Mean -log p, in nats, of the steered text under the untouched model."""
        answers = await asyncio.gather(*(self._ask(prompt, n, intervention, report="summary")
                                         for n, prompt in enumerate(prompts)))
        effects = [answer.steering.effects or {"choices": []} for answer in answers]
        costs = [choice["total"]["surprise"] for effect in effects for choice in effect["choices"]]
        if len(costs) < len(prompts):
            raise RuntimeError(f"{self._example.name}: effects were not measured")
        return float(sum(costs) / len(costs))

    async def _ask(self, prompt: Any, seed: int, intervention: dict[str, Any] | None, report: str = "none"
                   ) -> Completion:
        steering = {"interventions": [intervention] if intervention else [], "report": report}
        ask = self._client.complete if isinstance(prompt, str) else self._client.chat
        async with self._gate:
            return await ask(prompt, model=MODEL, steering=steering, max_tokens=MAX_TOKENS, temperature=1.0, seed=seed)


async def make(client: AsyncClient, example: Example) -> None:
    """Extract, choose, measure and write one artifact."""
    extracted = await client.extract(example.pairs(), name=example.name, description=example.description,
                                     tags=["bundled", *example.tags], trial={"effort": "none"}, **example.options)
    judge = Judge(client, example)
    dev = example.prompts_of("dev", example.label)[:MAX_DEV_PROMPTS]
    test = example.prompts_of("test", example.label)[:MAX_TEST_PROMPTS]
    layers = [int(layer) for layer in extracted.report["layers"]]
    best = await (ablation if example.options.get("op") == "ablate" else addition)(judge, example, dev, layers)
    width = int((await client.capabilities())["d_model"])
    card = await measured(judge, example, extracted.report, best, test, width)
    print(json.dumps({example.name: card}), flush=True)
    await write(client, example, best, card)


def acting(example: Example, layer: int, strength: float) -> dict[str, Any]:
    """The intervention of one layer and strength, on all tokens as `{"artifact": NAME}` alone means it."""
    if example.options.get("op") == "ablate":
        return {"artifact": example.name, "options": {"multi_site": True, "source_layer": layer}}
    return {"artifact": example.name, "layers": [layer], "strength": {"value": strength, "unit": "raw"}}


async def addition(judge: Judge, example: Example, prompts: list[Any], layers: list[int]) -> Candidate:
    """The most natural text that is as it should be; where both signs are promised, the weaker effect counts.

    Effect alone would take the largest strength there is, and with it broken sentences.
    """
    found = []
    # At the first layer a direction is about words, and behind the last nothing is left to act on it.
    for layer in layers[1:-1]:
        for strength in STRENGTHS:
            effect = await judge.share(prompts, example.target, acting(example, layer, strength))
            if example.opposite is not None:
                effect = min(effect, await judge.share(prompts, example.opposite, acting(example, layer, -strength)))
            found.append(Candidate(layer, strength, effect))
    enough = [choice for choice in found if choice.effect >= BAR]
    if not enough:
        return max(found, key=lambda choice: (choice.effect, -choice.strength))
    signs = (1, -1) if example.opposite is not None else (1,)
    costs = [max([await judge.surprise(prompts, acting(example, choice.layer, sign * choice.strength))
                  for sign in signs]) for choice in enough]
    return enough[costs.index(min(costs))]


async def ablation(judge: Judge, example: Example, prompts: list[Any], layers: list[int]) -> Candidate:
    """The source layer with the largest effect among those that leave the spared prompts' answers alone."""
    spared = example.prompts_of("dev", example.spared)[:MAX_DEV_PROMPTS]
    before = await judge.share(spared, example.target, None)
    found = []
    for layer in layers:
        wanted = acting(example, layer, 1.0)
        if before - await judge.share(spared, example.target, wanted) <= MAX_COST:
            found.append(Candidate(layer, 1.0, await judge.share(prompts, example.target, wanted)))
    if not found:
        raise RuntimeError(f"{example.name}: every layer spoils the answers that must stay as they are")
    return max(found, key=lambda choice: choice.effect)


async def measured(judge: Judge, example: Example, report: dict[str, Any], best: Candidate, prompts: list[Any],
                   width: int) -> dict[str, Any]:
    """The card: effect on test prompts beside its controls. All effects are shares of answers that are as meant."""
    chosen = acting(example, best.layer, best.strength)
    scores = report["layers"][str(best.layer)]
    test: dict[str, Any] = {
        "prompts": len(prompts), "unsteered": await judge.share(prompts, example.target, None),
        "steered": await judge.share(prompts, example.target, chosen), "pairs": scores["test"]}
    if example.opposite is not None:
        test["opposite"] = {
            "target": example.opposite, "unsteered": await judge.share(prompts, example.opposite, None),
            "steered": await judge.share(prompts, example.opposite, acting(example, best.layer, -best.strength))}
    if example.spared is not None:
        spared = example.prompts_of("test", example.spared)[:MAX_TEST_PROMPTS]
        test["spared"] = {"prompts": len(spared), "unsteered": await judge.share(spared, example.target, None),
                          "steered": await judge.share(spared, example.target, chosen)}
    norm = best.strength * scores["norm"]
    draws = [await judge.share(prompts, example.target, random_like(chosen, seed, norm, width))
             for seed in range(NUM_RANDOM)]
    return {"for": example.description, "target": example.target, "layers": [best.layer],
            "strength": Strength(value=best.strength).model_dump(mode="json"), "dev": {"steered": best.effect},
            "test": test, "controls": {
                "random_vectors": {"draws": NUM_RANDOM, "median": sorted(draws)[NUM_RANDOM // 2], "max": max(draws)}}}


def random_like(chosen: dict[str, Any], seed: int, norm: float, width: int) -> dict[str, Any]:
    """The same op with a random direction of the same length."""
    rng = random.Random(f"random vector {seed}")
    values = [rng.gauss(0, 1) for _ in range(width)]
    length = sum(value * value for value in values) ** 0.5
    vector = [value * norm / length for value in values]
    if "options" in chosen:
        return {"op": "ablate", "options": {"multi_site": True}, "inline": {"vector": vector}}
    return {"op": "add", "site": "resid_post", "layers": chosen["layers"], "inline": {"vector": vector}}


async def write(client: AsyncClient, example: Example, best: Candidate, card: dict[str, Any]) -> None:
    """The file, with the choice as its defaults."""
    own = get_format("safetensors")
    metadata, payload = own.read(await client.download_artifact(example.name), {}, Limits())
    chosen: dict[str, Any] = {"card": card}
    if metadata.op == "ablate":
        chosen["options"] = {"multi_site": True, "source_layer": best.layer}
    else:
        chosen |= {"layers": [best.layer], "strength": Strength(value=best.strength)}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{example.name}.safetensors").write_bytes(own.write(metadata.model_copy(update=chosen), payload))


def write_presets() -> None:
    own = get_format("safetensors")
    entries = []
    for preset in PRESETS:
        metadata, _ = own.read((FOLDER / f"{preset.artifact}.safetensors").read_bytes(), {}, Limits())
        intervention: dict[str, Any] = {"artifact": f"{preset.artifact}@production"}
        if preset.sign < 0:
            intervention["strength"] = {"value": preset.sign * metadata.strength.value, "unit": metadata.strength.unit}
        if preset.gate is not None:
            intervention["gate"] = {"probe": f"{preset.gate}@production"}
        entries.append({"name": preset.name, "description": preset.description,
                        "spec": {"interventions": [intervention]}})
    (FOLDER / "presets.json").write_text(json.dumps(entries, indent=2) + "\n")


async def main(names: list[str]) -> None:
    configure_logging("console")
    wanted = [example for example in EXAMPLES if not names or example.name in names]
    if wanted:
        async with running_server(MODEL, slots=64, slot_wait_s=600) as url, AsyncClient(url) as client:
            for example in wanted:
                await make(client, example)
    bundled_recipes.make(names)
    write_presets()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
