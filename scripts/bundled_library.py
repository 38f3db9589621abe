"""Makes the example artifacts of the bundled models: `python -m scripts.bundled_library [NAME...]`.

The directions of scripts.examples first. Everything goes through the HTTP API of a server on lab-dense, as a user would
do it: POST /v1/extract takes each direction from contrastive pairs, and POST /v1/evaluations grades whole answers at
every layer and strength on dev prompts, which decides between them. The card holds the shares on test prompts, beside
the untouched model and 20 random vectors of the same norm. Then the artifacts of scripts.bundled_recipes, whose recipes
choose and measure for themselves. The files go to lab/artifacts/MODEL.
"""

import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Any

from trimtab_client import AsyncClient

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
# The bundled models end an answer by themselves within this many tokens.
MAX_TOKENS = 64
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0, 6.0)
MAX_DEV_PROMPTS, MAX_TEST_PROMPTS = 40, 64
# Texts that a card shows of each arm.
SAMPLES = 6
NUM_RANDOM = 20
# An ablation may cost at most this share of the answers that must stay as they are.
MAX_COST = 0.05
# So many more broken answers than the untouched model gives are the most that a default may have.
MORE_BROKEN = 0.05
# Of interventions whose effect on dev is within this of the largest, the weakest is taken.
NEAR = 0.03


@dataclass(frozen=True)
class Candidate:
    """An intervention and what it does to dev prompts. effect: share of whole answers that are a success, of the weaker
    sign where both are promised. broken: share of broken answers over the untouched model's, of the worse sign.
    """

    layer: int
    strength: float
    effect: float
    broken: float


async def make(client: AsyncClient, example: Example) -> None:
    """Extract, choose, measure and write one artifact."""
    extracted = await client.extract(example.pairs(), name=example.name, description=example.description,
                                     tags=["bundled", *example.tags], trial={"effort": "none"}, **example.options)
    dev = example.prompts_of("dev", example.label)[:MAX_DEV_PROMPTS]
    test = example.prompts_of("test", example.label)[:MAX_TEST_PROMPTS]
    layers = [int(layer) for layer in extracted.report["layers"]]
    best = await (ablation if example.options.get("op") == "ablate" else addition)(client, example, dev, layers)
    card = await measured(client, example, extracted.report, best, test)
    print(json.dumps({example.name: card}), flush=True)
    await write(client, example, best, card)


def acting(example: Example, layer: int, strength: float) -> dict[str, Any]:
    """The intervention of one layer and strength, on all tokens as `{"artifact": NAME}` alone means it."""
    if example.options.get("op") == "ablate":
        return {"artifact": example.name, "options": {"multi_site": True, "source_layer": layer}}
    return {"artifact": example.name, "layers": [layer], "strength": {"value": strength, "unit": "raw"}}


async def graded(client: AsyncClient, example: Example, prompts: list[Any], intervention: dict[str, Any],
                 doses: list[float], **options: Any) -> dict[str, Any]:
    """The report of an evaluation by the example's graders."""
    graders = [grader for grader in (example.grader, example.opposite) if grader is not None]
    return await client.evaluate(prompts, graders, spec={"interventions": [intervention]}, doses=doses,
                                 temperature=1.0, max_tokens=MAX_TOKENS, **options)


def success(arm: dict[str, Any], grader: int = 0) -> float:
    return float(arm["graded"][grader]["success"]["share"])


def broken(arm: dict[str, Any]) -> float:
    return float(arm["graded"][0]["broken"]["share"])


async def addition(client: AsyncClient, example: Example, prompts: list[Any], layers: list[int]) -> Candidate:
    """The weakest of the layers and strengths that do most and break no more than `MORE_BROKEN` of the answers."""
    found = []
    signs = (1, -1) if example.opposite is not None else (1,)
    # At the first layer a direction is about words, and behind the last nothing is left to act on it.
    for layer in layers[1:-1]:
        report = await graded(client, example, prompts, acting(example, layer, 1.0),
                              [sign * strength for strength in STRENGTHS for sign in signs], draws=0, samples=0)
        before = broken(report["untouched"])
        arms = {round(result["steered"]["dose"], 4): result["steered"] for result in report["results"]}
        for strength in STRENGTHS:
            both = [(success(arms[sign * strength], n), broken(arms[sign * strength])) for n, sign in enumerate(signs)]
            found.append(Candidate(layer, strength, min(one for one, _ in both), max(one for _, one in both) - before))
    whole = [candidate for candidate in found if candidate.broken <= MORE_BROKEN]
    if not whole:
        raise RuntimeError(f"{example.name}: every layer and strength breaks the answers")
    most = max(candidate.effect for candidate in whole)
    near = [candidate for candidate in whole if candidate.effect >= most - NEAR]
    return min(near, key=lambda candidate: candidate.strength)


async def ablation(client: AsyncClient, example: Example, prompts: list[Any], layers: list[int]) -> Candidate:
    """The source layer with the largest effect among those that leave the spared prompts' answers alone."""
    spared = example.prompts_of("dev", example.spared)[:MAX_DEV_PROMPTS]
    found = []
    for layer in layers:
        report = await graded(client, example, prompts, acting(example, layer, 1.0), [1.0], draws=0, samples=0,
                              controls=spared)
        before, after = report["untouched"], report["results"][0]["steered"]
        kept = before["controls"]["success"]["share"] - after["controls"]["success"]["share"]
        if kept <= MAX_COST:
            found.append(Candidate(layer, 1.0, success(after), broken(after) - broken(before)))
    whole = [candidate for candidate in found if candidate.broken <= MORE_BROKEN] or found
    if not whole:
        raise RuntimeError(f"{example.name}: every layer spoils the answers that must stay as they are")
    return max(whole, key=lambda candidate: candidate.effect)


async def measured(client: AsyncClient, example: Example, extracted: dict[str, Any], best: Candidate, prompts: list[Any]
                   ) -> dict[str, Any]:
    """The card: shares of whole answers on test prompts that are as meant, beside the controls and the broken ones."""
    spared = [] if example.spared is None else example.prompts_of("test", example.spared)[:MAX_TEST_PROMPTS]
    doses = [1.0, -1.0] if example.opposite is not None else [1.0]
    report = await graded(client, example, prompts, acting(example, best.layer, best.strength), doses,
                          draws=NUM_RANDOM, controls=spared)
    before, result = report["untouched"], report["results"][0]
    after = result["steered"]
    test: dict[str, Any] = {
        "prompts": len(prompts), "max_tokens": MAX_TOKENS, "grader": example.grader, **_beside(before, after, 0),
        "pairs": extracted["layers"][str(best.layer)]["test"]}
    if example.opposite is not None:
        test["opposite"] = {"grader": example.opposite, **_beside(before, report["results"][1]["steered"], 1)}
    if spared:
        test["spared"] = {"prompts": len(spared), "unsteered": before["controls"]["success"]["share"],
                          "steered": after["controls"]["success"]["share"],
                          "broken": after["controls"]["broken"]["share"]}
    return {"for": example.description, "target": example.target, "layers": [best.layer],
            "strength": Strength(value=best.strength).model_dump(mode="json"),
            "dev": {"steered": round(best.effect, 4)}, "test": test,
            "controls": {"random_vectors": _spread(result["random"], 0)},
            "samples": [{"prompt": shown, "untouched": plain["text"], "steered": ours["text"], "random": other["text"],
                         "outcomes": [one["outcomes"][0] for one in (plain, ours, other)]}
                        for shown, plain, ours, other in zip(report["shown"], before["samples"], after["samples"],
                                                             result["random"][0]["samples"], strict=True)][:SAMPLES]}


def _beside(before: dict[str, Any], after: dict[str, Any], grader: int) -> dict[str, Any]:
    return {"unsteered": success(before, grader), "steered": success(after, grader),
            "unsteered_broken": broken(before), "broken": broken(after)}


def _spread(random: list[dict[str, Any]], grader: int) -> dict[str, Any]:
    shares = sorted(success(arm, grader) for arm in random)
    return {"draws": len(shares), "median": shares[len(shares) // 2], "max": shares[-1],
            "broken_max": max(broken(arm) for arm in random)}


async def write(client: AsyncClient, example: Example, best: Candidate, card: dict[str, Any]) -> None:
    """The file, with the candidate as its defaults."""
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
        async with (running_server(MODEL, slots=64, slot_wait_s=600, shadow_sample=0.0) as url,
                    AsyncClient(url, timeout=600) as client):
            for example in wanted:
                await make(client, example)
    bundled_recipes.make(names)
    write_presets()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
