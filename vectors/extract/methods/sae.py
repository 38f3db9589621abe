"""A sparse autoencoder of one place in the model, trained on its activations on given texts (see
`vectors.extract.dictionary.training` for the forms and their sources).

Texts are split 60/20/20; texts that are the same stay together. Activations are taken from train, the first token of
each text left out, as many models use it as a sink. They are centred, scaled so that the root of the width is their
length, and put on the disk, from where batches are drawn. Two trainings from different seeds run side by side: the
first is what is stored, and how near its features are to those of the second is on the card, beside what both are worth
on test. A training that was cut off goes on from its last checkpoint.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops.base import VECTOR_SITES
from steering.programs.layers import explicit_layers
from vectors.extract.dictionary.checkpoint import Checkpoint
from vectors.extract.dictionary.quality import loss_recovered, of_rows, stability
from vectors.extract.dictionary.rows import ActivationRows
from vectors.extract.dictionary.training import Activation, Plan, Training
from vectors.extract.items import Splits, digest_of, split_items
from vectors.extract.recipe import Made, Recipe, RecipeOptions
from vectors.extract.refusals import InvalidData, TooFewExamples
from vectors.extract.standing import rounded
from vectors.extract.subject import Prompt, Subject, Tokens, encoded, stream
from vectors.extract.work import Work

# Features for each dim of the activations, where nobody says how many.
EXPANSION = 8
# Of what one training holds in memory, and of the numbers that an artifact may have.
MOST_BYTES, MOST_NUMBERS = 4 * 2**30, 2**26 - 2**20
# Rows of dev and of test, which memory holds.
MOST_EVAL_ROWS = 20_000
SAVED_EVERY = 200
# Fewer rows than this for each feature leave many features to single tokens.
FEW_ROWS = 10
LEAST_EXPLAINED = 0.5
# A product of this size tells how fast this processor is.
PROBE = (256, 512, 512)


class SaeRequest(RecipeOptions):
    """Texts on whose activations a dictionary is trained."""

    texts: Annotated[list[Prompt], Field(min_length=1, max_length=100_000)] = Field(
        description="Texts, conversations or token ids, of the kind that is served.")
    site: Site = Field(default="resid_post", description="Where activations are read.")
    activation: Activation = Field(default="topk", description="Which features are on: the k largest (topk), or those "
                                   "over thresholds of their own that aim at k on the average (jumprelu).")
    features: int | None = Field(default=None, ge=8, le=2**17, description="Features of the dictionary; null: eight "
                                 "times the width.")
    k: int = Field(default=32, ge=1, le=4096, description="Features that are active on a token.")
    steps: int = Field(default=4000, ge=10, le=1_000_000, description="Steps of each training.")
    batch: int = Field(default=512, ge=16, le=16_384, description="Tokens of a step.")
    rate: float | None = Field(default=None, gt=0, le=0.1, description="Highest learning rate; null: 0.0002 times the "
                               "root of 16384 / features, at most 0.003.")
    max_rows: int = Field(default=200_000, ge=100, le=5_000_000, description="Most activations that are kept on the "
                          "disk for training, four bytes a number.")
    max_eval: int = Field(default=200, ge=5, le=10_000, description="Most dev texts, and most test texts, that are "
                          "read.")
    seeds: Literal[1, 2] = Field(default=2, description="Trainings; with two the card says how stable the features "
                                 "are.")


@dataclass(frozen=True)
class Data:
    texts: list[Tokens]
    splits: Splits
    layer: int
    plan: Plan


class Sae(Recipe):
    name = "sae"
    summary = "a sparse autoencoder of one place, whose features ops, monitors and gates name"
    request = SaeRequest
    ops = ("sae",)
    sites = VECTOR_SITES
    untried = "which of its features do what is for whoever names them to find out"

    def prepare(self, request: SaeRequest, subject: Subject) -> Data:
        layer = _layer(request, subject.facts)
        texts = [encoded(subject, prompt, ("texts", n)) for n, prompt in enumerate(request.texts)]
        splits = split_items([digest_of(text) for text in texts], [None] * len(texts), request.seed, "texts")
        width = subject.facts.width(request.site)
        plan = Plan(width, request.features or EXPANSION * width, request.k, request.activation, request.steps,
                    request.batch, request.rate)
        if plan.k > plan.features // 2:
            raise InvalidData(f"k is {plan.k}, and there are {plan.features} features", param="k",
                              fix=f"Use at most {plan.features // 2}.")
        if 2 * plan.features * width > MOST_NUMBERS:
            raise InvalidData(f"{plan.features} features of width {width} are {2 * plan.features * width} numbers, and "
                              f"an artifact may have {MOST_NUMBERS}", param="features", fix="Ask for fewer.")
        if request.seeds * plan.nbytes > MOST_BYTES:
            raise InvalidData(f"the training would take {request.seeds * plan.nbytes >> 20} MiB of memory, and "
                              f"{MOST_BYTES >> 20} are the most", param="features",
                              fix="Ask for fewer features, a smaller batch or one seed.")
        for split, members in splits.items():
            # One token is the first, one says nothing of a variance.
            if sum(len(texts[n]) - 1 for n in members) < 2:
                raise TooFewExamples(f"the texts of the {split} split have no tokens behind the first", param="texts")
        return Data(texts, splits, layer, plan)

    def passes(self, request: SaeRequest, data: Data, facts: ModelFacts) -> int:
        sizes = {split: sum(len(data.texts[n]) for n in _some(request, data, split)) for split in data.splits}
        return min(sizes["train"], 2 * request.max_rows) + sizes["dev"] + 5 * sizes["test"]

    def computing(self, request: SaeRequest, data: Data) -> float:
        began = time.perf_counter()
        a, b, c = PROBE
        torch.ones(a, b) @ torch.ones(b, c)
        return data.plan.operations * request.seeds * (time.perf_counter() - began) / (2 * a * b * c)

    def make(self, request: SaeRequest, data: Data, work: Work) -> Made:
        layer, plan = data.layer, data.plan
        chosen = {split: [data.texts[n] for n in _some(request, data, split)] for split in data.splits}
        with ExitStack() as stack:
            rows = {}
            for n, (split, texts) in enumerate(chosen.items()):
                most = min(request.max_rows if split == "train" else MOST_EVAL_ROWS,
                           sum(len(text) - 1 for text in texts))
                rows[split] = stack.enter_context(ActivationRows(most, plan.width)).taken(stream(
                    work.subject, texts, request.site, [layer], None, work.within(0.05 * n, 0.05 * n + 0.05, "capture"),
                    param=lambda _: ("texts",)), layer)
            train = rows["train"]
            mean, scale = train.mean, train.scale
            checkpoint = Checkpoint(work.checkpoint)
            trained = _trained(request, plan, train, checkpoint, work)
            numbers = [one.numbers(mean, scale) for one in trained]
            dev, test = (torch.cat(list(rows[split].chunks())) for split in ("dev", "test"))
            counts = {split: held.count for split, held in rows.items()}
        found = of_rows(numbers[0], dev, test, request.generator(1))
        held_out = [text for text in chosen["test"] if len(text) > 1]
        told: dict[str, Any] = {**found, "loss": loss_recovered(
            work, request.site, layer, numbers[0], mean.float(), held_out, work.within(0.9, 1.0, "control"))}
        if len(numbers) > 1:
            told["stability"] = stability(numbers[0]["decoder"], numbers[1]["decoder"], request.draws,
                                          request.generator(2))
            told["other_seed"] = of_rows(numbers[1], dev, test, request.generator(1))
        warnings = []
        if counts["train"] < FEW_ROWS * plan.features:
            warnings.append(f"{counts['train']} activations for {plan.features} features are few: give more texts, or "
                            "ask for fewer features")
        if checkpoint.lost is not None:
            warnings.append(f"the state of the training could not be kept: {checkpoint.lost}")
        report = {"method": self.name, "site": request.site, "layer": layer, "activation": plan.activation,
                  "features": plan.features, "k": plan.k, "steps": plan.steps, "batch": plan.batch,
                  "rate": rounded(plan.highest_rate), "rows": counts,
                  "texts": {split: len(texts) for split, texts in chosen.items()},
                  "memory_bytes": request.seeds * plan.nbytes, **told, **({"warnings": warnings} if warnings else {})}
        return Made(
            kind="sae", op="sae", site=request.site, numbers={layer: numbers[0]}, report=report, default_layers=[layer],
            sign_convention="a feature's value is the length, in the activations' units, of what it adds",
            dev={}, test={name: found[name] for name in ("explained", "l0", "dead")},
            card={"activation": plan.activation, "features": plan.features, "k": plan.k, "rows": counts, **told},
            data={"data_hash": digest_of([data.texts, {s: list(m) for s, m in data.splits.items()}]),
                  "num_texts": len(data.texts)},
            draft=_draft(told))


def _layer(request: SaeRequest, facts: ModelFacts) -> int:
    """The one asked for; of "all" the one in the middle."""
    if request.layers == "all":
        offered = sorted(facts.sites.get(request.site, ()))
        if not offered:
            facts.check_site(request.site, 0, "site")
        return offered[len(offered) // 2]
    layers = sorted(explicit_layers(request.layers, facts))
    if len(layers) != 1:
        raise InvalidData(f"{len(layers)} layers are asked for, and a dictionary is of one", param="layers",
                          fix="Name one.")
    facts.check_site(request.site, layers[0], "layers")
    return layers[0]


def _some(request: SaeRequest, data: Data, split: Any) -> Sequence[int]:
    """Texts of a split that are read: all of train until there are rows enough, some of the others."""
    members = data.splits[split]
    if split != "train":
        return members[:request.max_eval]
    order = torch.randperm(len(members), generator=request.generator(3)).tolist()
    return [members[n] for n in order]


def _trained(request: SaeRequest, plan: Plan, rows: ActivationRows, checkpoint: Checkpoint, work: Work
             ) -> list[Training]:
    seeds = [(request.seed + 7919 * n) % 2**31 for n in range(request.seeds)]
    trained = [Training(plan, seed) for seed in seeds]
    start = 0
    if (kept := checkpoint.load()) is not None:
        start = kept[0]
        for n, one in enumerate(trained):
            prefix = f"{n}."
            one.restore({name.removeprefix(prefix): tensor for name, tensor in kept[1].items()
                         if name.startswith(prefix)}, start)
    span = work.within(0.15, 0.9, "fit")
    for step in range(start, plan.steps):
        for n, (one, seed) in enumerate(zip(trained, seeds, strict=True)):
            # Asked before each step, of which one with many features takes a second.
            span((step + n / len(trained)) / plan.steps)
            one.step(rows.batch(plan.batch, seed, step))
        if (step + 1) % SAVED_EVERY == 0:
            checkpoint.save(step + 1, {f"{n}.{name}": tensor for n, one in enumerate(trained)
                                       for name, tensor in one.state().items()})
    return trained


def _draft(told: dict[str, Any]) -> str | None:
    if told["explained"] < LEAST_EXPLAINED:
        return (f"it explains {told['explained']:.0%} of the variance of activations that it was not trained on, and "
                f"{LEAST_EXPLAINED:.0%} are needed")
    if told["loss"]["recovered_of_mean"] <= 0:
        return "the model does no better with what it reconstructs than with the mean of all activations"
    return None


METHOD = Sae()
