"""Swaps of weekdays and of grammatical number through patches, checked on a served model.

`python -m lab.real.patching MODEL --task agreement --places resid_post.20 mlp_act.20` prints rows of a table.
Directions are found on one set of items and checked on others: of number the difference of means, of weekdays the space
of the principal components of the days' activations in another frame.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from trimtab_client import Client, PatchCheck

from lab.real.serving import serving

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DEV_NOUNS = ("car", "book", "tree", "cup", "door", "coin", "lamp", "ring", "boat", "hat")
TEST_NOUNS = ("key", "bird", "song", "road", "map", "ball", "bag", "wall", "king", "tool")
FRAMES = ("The {} that I saw yesterday", "I think that the {} near the old house")
DAY_FRAMES = {"dev": "If today is {}, then tomorrow is", "test": "The day after {} is"}
LAB_DAY_FRAMES = {"dev": "Paula likes the market. One day after {} is", "test": "What comes one day after {}? It is"}


def agreement(nouns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Both ways of every noun: a verb in the singular and in the plural."""
    found = []
    for noun in dict.fromkeys(nouns):
        for frame in FRAMES:
            one = {"base": frame.format(noun), "base_answer": " is"}
            many = {"base": frame.format(f"{noun}s"), "base_answer": " are"}
            found += [pair(one, many), pair(many, one)]
    return found


def weekdays(frame: str) -> list[dict[str, Any]]:
    runs = [{"base": frame.format(day), "base_answer": f" {DAYS[(n + 1) % 7]}"} for n, day in enumerate(DAYS)]
    return [pair(runs[n], runs[(n + step) % 7]) for n in range(7) for step in (2, 4)]


def pair(base: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    return {**base, "source": source["base"], "source_answer": source["base_answer"]}


def read(client: Client, texts: list[str], site: str, layer: int) -> torch.Tensor:
    """Activations `[texts, width]` at the last token."""
    kept = client.capture(texts, {site: [layer]}, positions=[-1])
    found: torch.Tensor = load(client.download_activations(kept.id))[f"{site}.{layer}"]
    client.delete_activations(kept.id)
    return found


def of_number(client: Client, site: str, layer: int) -> list[list[float]]:
    pairs = agreement(DEV_NOUNS)
    h = read(client, [one["base"] for one in pairs], site, layer)
    return [(h[1::2].mean(0) - h[0::2].mean(0)).tolist()]


def of_days(client: Client, frame: str, site: str, layer: int) -> list[list[float]]:
    h = read(client, [frame.format(day) for day in DAYS], site, layer)
    directions = torch.linalg.svd(h - h.mean(0), full_matrices=False).Vh[:6]
    found: list[list[float]] = directions.tolist()
    return found


def checked(client: Client, task: str, site: str, layer: int, layers: int, frames: dict[str, str]) -> PatchCheck:
    basis = of_number(client, site, layer) if task == "agreement" else of_days(client, frames["dev"], site, layer)
    pairs = agreement(TEST_NOUNS)[::2] if task == "agreement" else weekdays(frames["test"])
    later = [f"{part}.{n}" for n in range(layer + 1, layers) for part in ("attention", "mlp")]
    readers = ["unembedding", *later] if site.startswith("resid") else []
    found: PatchCheck = client.check_patch(pairs, site=site, layer=layer, basis=basis, readers=readers)
    return found


def rows(model: str, tasks: list[str], places: list[str]) -> Iterator[tuple[str, str, PatchCheck]]:
    frames = LAB_DAY_FRAMES if "lab" in model else DAY_FRAMES
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), model) as (_, url), Client(url) as client:
        layers = int(client.capabilities()["num_layers"])
        for task in tasks:
            for place in places:
                site, _, layer = place.partition(".")
                yield task, place, checked(client, task, site, int(layer), layers, frames)


def line(task: str, place: str, found: PatchCheck) -> str:
    def part(one: dict[str, float] | None) -> str:
        return "-" if one is None else f"{one['decrease']:.2f} ({one['interchange']:.2f})"

    return (f"| {task} | {place} | {found.pairs}/{found.pairs + found.dropped} | {part(found.full)} | "
            f"{part(found.direction)} | {part(found.row)} | {part(found.null)} | {found.random_95:.2f} | "
            f"{found.null_norm:.2f} | {found.dormancy or 0:.2f} | {found.verdict} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--task", action="append", choices=("weekdays", "agreement"))
    parser.add_argument("--places", nargs="+", default=["resid_post.20", "mlp_act.20"])
    asked = parser.parse_args()
    for found in rows(asked.model, asked.task or ["weekdays", "agreement"], asked.places):
        print(line(*found), flush=True)
