"""Inference-time intervention: heads ranked by a probe, and a shift along each (Li et al. 2023, arXiv 2306.03341).

What the paper leaves open is decided here: the number of heads is a share of all (5 per cent; 48 of 1024 in the paper);
heads are ranked by the dev accuracy of a probe fitted on train; the shift is `sigma` times the unit mean-mass (or
probe) direction of train and dev, sigma being the spread of those texts along it, so that strength 1 is one sigma (15
in the paper, on much larger models: choose it by effect). Every head counts on its own; grouped keys and values do not
matter, as what is shifted is the head's output.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field

from steering.language.strength import Strength
from steering.language.vocabulary import Site
from vectors.extract.answers import AnsweredOptions
from vectors.extract.data import Dataset
from vectors.extract.methods.logistic_probe import LogisticProbe
from vectors.extract.methods.mean_difference import MeanDifference
from vectors.extract.programs import LAST, program_of
from vectors.extract.readout import Readout, ReadoutOptions, make_readout
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import FitFailed
from vectors.extract.scratch import Scratch
from vectors.extract.standing import random_like, rounded, standing
from vectors.extract.subject import Subject, stream
from vectors.extract.text_pairs import TextPairs, paired
from vectors.extract.work import Work

SITE: Site = "head_out"
Heads = list[tuple[int, int]]


class HeadShiftRequest(AnsweredOptions):
    """Contrastive pairs."""

    pairs: TextPairs
    direction: Literal["mean", "probe"] = Field(default="mean", description="Difference of means, or probe weights.")
    share: float = Field(default=0.05, gt=0, le=1, description="Share of all heads to take.")
    strength: float = Field(default=3.0, gt=0, le=1000, description="Default strength, in sigmas.")
    readout: ReadoutOptions | None = Field(default=None, description="Measure the effect on what comes next, after "
                                           "the negative test texts.")


class HeadShift(Recipe):
    name = "head_shift"
    summary = "heads that a probe reads the concept from, each with a shift along it"
    request = HeadShiftRequest
    ops = ("head_mask",)
    sites = (SITE,)
    scope = LAST
    effect = "effect_percentile"
    untried = "without a readout nothing says what the shifts should do to an answer"
    chance = {**Recipe.chance, "effect_percentile": "shifts of equal length in random directions"}

    def prepare(self, request: HeadShiftRequest, subject: Subject) -> tuple[Dataset, Readout | None]:
        site_layers(request, SITE, subject.facts)
        readout = make_readout(request.readout, subject) if request.readout is not None else None
        return paired(request.pairs, subject, request.seed), readout

    def make(self, request: HeadShiftRequest, data: tuple[Dataset, Readout | None], work: Work) -> Made:
        facts, layers = work.facts, site_layers(request, SITE, work.facts)
        pairs, readout = data
        texts = [text for pair in pairs.pairs for text in (pair.positive, pair.negative)]
        splits = {split: torch.tensor(members) for split, members in pairs.splits.items()}
        with Scratch(layers, len(texts), facts.width(SITE)) as store:
            for n, found in stream(work.subject, texts, SITE, layers, [-1], work.within(0.0, 0.5, "capture")):
                for layer in layers:
                    store.put(layer, n, found[layer][0])

            def sides(key: tuple[int, int], members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                layer, head = key
                part = slice(head * facts.head_dim, (head + 1) * facts.head_dim)
                return (store.rows(layer, (2 * members).tolist(), part),
                        store.rows(layer, (2 * members + 1).tolist(), part))

            keys = [(layer, head) for layer in layers for head in range(facts.num_heads)]
            count = max(1, math.ceil(request.share * len(keys) - 1e-9))
            span = work.within(0.5, 0.65, "fit")
            dev, test = {}, {}
            for n, key in enumerate(keys):
                span(n / len(keys))
                dev[key], test[key] = probe_accuracy(sides(key, splits["train"]), sides(key, splits["dev"]),
                                                     sides(key, splits["test"]))
            chosen = sorted(keys, key=lambda key: (-dev[key], key))[:count]
            # The null: a ranking of probes on dealt labels, whose heads are then read with their true labels.
            generator, span = request.generator(1), work.within(0.65, 0.8, "control")
            found_accuracy = sum(test[key] for key in chosen) / count
            random_draws, shuffled_draws = [], []
            for n in range(request.draws):
                span(n / request.draws)
                picked = torch.randperm(len(keys), generator=generator)[:count].tolist()
                random_draws.append(sum(test[keys[i]] for i in picked) / count)
                dealt = []
                for key in chosen:
                    pooled = torch.cat(sides(key, splits["train"]))
                    order = torch.randperm(len(pooled), generator=generator)
                    half = len(pooled) // 2
                    dealt.append(probe_accuracy((pooled[order[:half]], pooled[order[half:]]),
                                                sides(key, splits["dev"]), sides(key, splits["test"]))[1])
                shuffled_draws.append(sum(dealt) / count)
            both = torch.cat([splits["train"], splits["dev"]])
            shifts = {key: _shift(request.direction, *sides(key, both)) for key in chosen}
        control = {"random_heads": standing(found_accuracy, random_draws),
                   "shuffled_labels": standing(found_accuracy, shuffled_draws)}
        report: dict[str, Any] = {
            "method": self.name, "site": SITE, "pairs": {split: len(members) for split, members in splits.items()},
            "heads": [{"layer": layer, "head": head, "dev_accuracy": rounded(dev[layer, head]),
                       "test_accuracy": rounded(test[layer, head])} for layer, head in chosen],
            "test": {"accuracy": rounded(found_accuracy)}, "controls": control}
        card: dict[str, Any] = {"heads": count, "random_percentile": control["random_heads"]["percentile"],
                                "shuffled_percentile": control["shuffled_labels"]["percentile"]}
        numbers = head_numbers(shifts)
        if readout is not None:
            negatives = [pairs.pairs[n].negative for n in pairs.splits["test"]]
            span = work.within(0.8, 1.0, "control")

            def moved(tensors: dict[int, dict[str, torch.Tensor]], strength: float, n: int) -> float:
                program = program_of(facts, "head_set", "head_mask", SITE, tensors, options={"mode": "shift"},
                                     strength=strength)
                return float(readout.log_odds(negatives, span.part(n, 2 * request.draws + 3), program).mean())

            before = float(readout.log_odds(negatives, span.part(0, 2 * request.draws + 3)).mean())
            toward, away = moved(numbers, request.strength, 1), moved(numbers, -request.strength, 2)
            directions, heads = [], []
            for n in range(request.draws):
                drawn = head_numbers({key: random_like(shift, generator) for key, shift in shifts.items()})
                directions.append(moved(drawn, request.strength, 2 * n + 3) - before)
                others = [key for key in keys if key not in chosen] or keys
                picked = torch.randperm(len(others), generator=generator)[:count].tolist()
                # The same lengths at other heads, along random directions there.
                drawn = head_numbers({others[i]: random_like(shifts[key], generator)
                                      for i, key in zip(picked, chosen, strict=False)})
                heads.append(moved(drawn, request.strength, 2 * n + 4) - before)
            report["effect"] = {"log_odds_before": rounded(before), "toward": standing(toward - before, directions),
                                "toward_vs_other_heads": standing(toward - before, heads),
                                "away": rounded(away - before)}
            card["effect_percentile"] = report["effect"]["toward"]["percentile"]
        return Made(kind="head_set", op="head_mask", site=SITE, numbers=numbers, options={"mode": "shift"},
                    strength=Strength(value=request.strength),
                    sign_convention="positive strength moves towards the positive texts; 1 is one sigma",
                    dev={"probe_accuracy": rounded(sum(dev[key] for key in chosen) / count)},
                    test={"probe_accuracy": rounded(found_accuracy)},
                    report=report, card=card, data={"data_hash": pairs.digest, "num_pairs": len(pairs.pairs)})


def probe_accuracy(train: tuple[torch.Tensor, torch.Tensor], *held_out: tuple[torch.Tensor, torch.Tensor]
                   ) -> list[float]:
    """Accuracy of a logistic probe on each of `held_out`; its threshold lies between the train means."""
    generator = torch.Generator().manual_seed(0)
    weight = LogisticProbe().fit(*train, generator)
    middle = (train[0].mean(dim=0) + train[1].mean(dim=0)) @ weight / 2
    return [float(((positive @ weight > middle).double().mean() + (negative @ weight < middle).double().mean()) / 2)
            for positive, negative in held_out]


def head_numbers(shifts: dict[tuple[int, int], torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """Tensors of a head set, by layer, heads rising."""
    numbers: dict[int, dict[str, torch.Tensor]] = {}
    for layer in sorted({layer for layer, _ in shifts}):
        heads = sorted(head for other, head in shifts if other == layer)
        numbers[layer] = {"heads": torch.tensor(heads),
                          "shift": torch.stack([shifts[layer, head] for head in heads])}
    return numbers


def _shift(direction: str, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    method = MeanDifference() if direction == "mean" else LogisticProbe()
    theta = method.fit(positive, negative, torch.Generator().manual_seed(0))
    length = float(theta.norm())
    if length == 0:
        raise FitFailed("a chosen head has the same mean on both sides", param="pairs", fix="Take fewer heads.")
    sigma = float((torch.cat([positive, negative]) @ (theta / length)).std(correction=0))
    return theta / length * sigma


METHOD = HeadShift()
