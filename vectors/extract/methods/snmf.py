"""Features of MLP activations by semi-nonnegative factorisation (Shafran, Ronen, Fahn, Ravfogel, Geiger, Geva 2025,
arXiv 2506.10920): groups of few neurons that are active together, and the one that tells a concept.

What the paper leaves open is decided here. Tokens of the train texts are factorised, without labels and without the
first token of each text, an attention sink in many models. Which group is the concept's is chosen on train, by how well
the mean of h . z over a text's tokens tells its texts from the others, z being the group at unit length; the layer is
chosen on dev. A vector is z times the spread of h . z over tokens, so that strength 1 is one sigma.

Controls: groups of as many random neurons with random values, the best of as many; and a factorisation of the same
activations with each neuron's values dealt to other tokens, which keeps how active neurons are and not which are active
together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator

from steering.artifacts.payload import Kind
from steering.language.strength import Strength
from steering.language.vocabulary import Op
from steering.models.facts import ModelFacts
from vectors.extract.answers import AnsweredOptions
from vectors.extract.items import Examples, Label, labelled
from vectors.extract.programs import EVERYWHERE, program_of
from vectors.extract.readout import Readout, ReadoutOptions, make_readout
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import FitFailed, InvalidData, TooFewExamples
from vectors.extract.scratch import Scratch
from vectors.extract.semi_nmf import Factors, alike, factorise, shuffled_columns
from vectors.extract.standing import rounded, standing
from vectors.extract.subject import Subject, stream
from vectors.extract.telling import Telling, positions_of, random_groups
from vectors.extract.work import Span, Work

SITE: Literal["mlp_act"] = "mlp_act"
FORMS: Mapping[str, Op] = {"vector": "add", "subspace": "ablate", "neuron_set": "neuron_mask"}
# Multiplications of one run, some hours of a core, and numbers of usage, which are in memory a few times.
MOST_WORK, MOST_USAGE = 1e14, 5e7
# Mean activations of all texts, in memory once.
MOST_MEANS = 2.5e8
DEALS, SHOWN, MOST_READOUT = 3, 20, 40


class SnmfRequest(AnsweredOptions):
    """Texts of several concepts."""

    examples: Examples
    target: Label = Field(description="The concept whose group is wanted.")
    form: Literal["vector", "subspace", "neuron_set"] = Field(
        default="vector", description="What the artifact holds: the group as a vector (add), directions of the best "
        "groups (ablate), or their neurons (neuron_mask).")
    take: int = Field(default=1, ge=1, le=16, description="Best groups to take; one for a vector.")
    features: int = Field(default=50, ge=2, le=512, description="Groups of the factorisation.")
    share: float = Field(default=0.01, gt=0, le=1, description="Share of the layer's neurons that a group may hold.")
    iterations: int = Field(default=300, ge=1, le=20_000, description="Most of each beginning.")
    patience: int = Field(default=60, ge=1, le=20_000, description="Iterations without an improvement that end it.")
    restarts: int = Field(default=5, ge=2, le=32, description="Random beginnings; that with the least error is taken.")
    max_tokens: int = Field(default=20_000, ge=100, le=200_000, description="Most tokens that are factorised, drawn "
                            "from the train texts.")
    strength: float = Field(default=4.0, gt=0, le=1000, description="Default strength of a vector, in sigmas.")
    readout: ReadoutOptions | None = Field(default=None, description="Measure the effect on what comes next: of a "
                                           "vector after test texts of other concepts, of the other forms after those "
                                           "of the target.")

    @model_validator(mode="after")
    def _one_vector(self) -> Self:
        if self.form == "vector" and self.take != 1:
            raise ValueError("a vector is one group; take several with the form subspace or neuron_set")
        return self


@dataclass(frozen=True)
class _Layer:
    """What was found at one layer. pairs: the best beginning first. order: groups, the one that tells the target best
    on train first. means: of each text `[texts, f]`. resting: mean of each neuron over the tokens `[f]`. sigma: spread
    of the first group over tokens."""

    number: int
    pairs: Sequence[Factors]
    order: Sequence[int]
    means: torch.Tensor
    resting: torch.Tensor
    sigma: float

    @property
    def error(self) -> float:
        return self.pairs[0].error

    def taken(self, count: int) -> torch.Tensor:
        """`[f, count]`: the first groups, at unit length."""
        return self.pairs[0].unit()[:, list(self.order[:count])]


class Snmf(Recipe):
    name = "snmf"
    summary = "groups of few MLP neurons that are active together, and the one that tells a concept"
    request = SnmfRequest
    ops = ("add", "ablate", "neuron_mask")
    sites = (SITE,)
    scope = EVERYWHERE
    effect = "effect_percentile"
    untried = "without a readout nothing says what the group should do to an answer"
    chance = {"random_percentile": "random groups of as many neurons, the best of as many",
              "effect_percentile": "random groups of equal size"}

    def prepare(self, request: SnmfRequest, subject: Subject) -> tuple[Telling, Readout | None]:
        facts, layers = subject.facts, _layers(request, subject.facts)
        data = labelled(request.examples, subject, request.seed, target=request.target)
        tokens = min(sum(len(data.texts[n]) - 1 for n in data.splits["train"]), request.max_tokens)
        if tokens < 2 * request.features:
            raise TooFewExamples(f"{tokens} tokens of train texts for {request.features} groups; at least twice as "
                                 "many tokens as groups are needed", param="features",
                                 fix="Give more texts, or ask for fewer.")
        runs = len(layers) * request.restarts + DEALS
        work = 2.0 * runs * request.iterations * tokens * facts.width(SITE) * request.features
        means = len(data.texts) * facts.width(SITE) * len(layers)
        if means > MOST_MEANS:
            raise InvalidData(f"means of all texts are {means:.0e} numbers; {MOST_MEANS:.0e} are the most",
                              param="examples", fix="Give fewer texts, or name fewer layers.")
        if work > MOST_WORK or tokens * request.features > MOST_USAGE:
            raise InvalidData(f"this takes {work:.0e} multiplications and {tokens * request.features:.0e} numbers of "
                              f"usage; {MOST_WORK:.0e} and {MOST_USAGE:.0e} are the most", param="max_tokens",
                              fix="Lower max_tokens, iterations, features or restarts, or name fewer layers.")
        readout = make_readout(request.readout, subject) if request.readout is not None else None
        return Telling(data, request.target), readout

    def make(self, request: SnmfRequest, data: tuple[Telling, Readout | None], work: Work) -> Made:
        telling, readout = data
        texts, layers, width = telling.texts, _layers(request, work.facts), work.facts.width(SITE)
        picked = positions_of(texts, request.max_tokens, request.generator(3))
        rows = sum(map(len, picked.values()))
        with Scratch(layers, rows, width) as tokens, Scratch(layers, len(texts.texts), width) as means:
            at = 0
            for n, found in stream(work.subject, texts.texts, SITE, layers, None, work.within(0.0, 0.3, "capture")):
                for layer in layers:
                    h = found[layer][1:] if len(found[layer]) > 1 else found[layer]
                    means.put(layer, n, h.mean(dim=0))
                    for i, position in enumerate(picked.get(n, ())):
                        tokens.put(layer, at + i, found[layer][position])
                at += len(picked.get(n, ()))
            span = work.within(0.3, 0.6, "fit")
            fitted = [_fitted(request, layer, tokens, means, telling, span.part(i, len(layers)))
                      for i, layer in enumerate(layers)]
            reads = {one.number: telling.auc(one.taken(request.take), one.means, "dev") for one in fitted}
            chosen = max(fitted, key=lambda one: (reads[one.number], -one.number))
            dealt = _dealt(request, chosen, tokens, telling, work.within(0.6, 0.8, "control"))
        kept, generator = _kept(request, work.facts), request.generator(2)
        taken = chosen.taken(request.take)
        if not bool(taken.any(dim=0).all()):
            raise FitFailed("no group tells the target from the other texts", param="features",
                            fix="Take fewer groups, or give texts that the model tells apart.")
        found_auc = telling.auc(taken, chosen.means, "test")
        random = [telling.best_auc(random_groups(width, request.features, kept, generator), chosen.means, request.take)
                  for _ in range(request.draws)]
        controls: dict[str, Any] = {"random_groups": standing(found_auc, random),
                                    "dealt_neurons": standing(found_auc, [one for one, _ in dealt])}
        stable = alike(chosen.pairs[0].groups, [pair.groups for pair in chosen.pairs[1:]])
        report: dict[str, Any] = {
            "method": self.name, "site": SITE, "layer": chosen.number, "examples": texts.counts(), "tokens": rows,
            "neurons_of_a_group": kept, "iterations": chosen.pairs[0].iterations,
            "explained": rounded(1 - chosen.error), "explained_dealt": [rounded(1 - error) for _, error in dealt],
            "explained_by_beginning": [rounded(1 - pair.error) for pair in chosen.pairs],
            "layers": {str(one.number): {"dev_auc": rounded(reads[one.number]), "explained": rounded(1 - one.error)}
                       for one in fitted},
            "groups": _told(chosen, telling, stable), "dev": {"auc": rounded(reads[chosen.number])},
            "test": {"auc": rounded(found_auc), "auc_error": rounded(telling.error(taken, chosen.means))},
            "controls": controls}
        card: dict[str, Any] = {
            "chosen_layer": chosen.number, "explained": report["explained"],
            "stability": rounded(float(stable[list(chosen.order[:request.take])].mean())),
            "random_percentile": controls["random_groups"]["percentile"]}
        numbers = _numbers(request.form, taken, chosen)
        if readout is not None:
            report["effect"] = _effect(request, chosen, numbers, telling, readout, generator,
                                       work.within(0.8, 1.0, "control"))
            card["effect_percentile"] = report["effect"]["percentile"]
        vector = request.form == "vector"
        return Made(kind=request.form, op=FORMS[request.form], site=SITE, numbers={chosen.number: numbers},
                    strength=Strength(value=request.strength if vector else 1.0), report=report, dev=report["dev"],
                    test=report["test"], card=card, sigma={chosen.number: chosen.sigma} if vector else None,
                    sign_convention="positive strength makes the group more active; 1 is one sigma of its activity "
                    "over tokens" if vector else "taking the group out is meant to remove the concept",
                    data={"data_hash": texts.digest, "num_examples": len(texts.texts), "target": request.target})


def _layers(request: SnmfRequest, facts: ModelFacts) -> list[int]:
    """Those asked for; of "all" the ones at a quarter, half and three quarters of the depth."""
    layers = site_layers(request, SITE, facts)
    if request.layers != "all":
        return layers
    return sorted({layers[int(len(layers) * share)] for share in (0.25, 0.5, 0.75)})


def _kept(request: SnmfRequest, facts: ModelFacts) -> int:
    return ceil(request.share * facts.width(SITE))


def _factors(request: SnmfRequest, data: npt.NDArray[np.float32], restarts: int, generator: torch.Generator, span: Span
             ) -> list[Factors]:
    return factorise(data, request.features, kept=_kept(request, span.work.facts), iterations=request.iterations,
                     patience=request.patience, restarts=restarts, generator=generator, step=span)


def _fitted(request: SnmfRequest, layer: int, tokens: Scratch, means: Scratch, telling: Telling, span: Span) -> _Layer:
    data = tokens.layer(layer)
    pairs = _factors(request, data, request.restarts, request.generator(layer + 16), span)
    of_texts = means.rows(layer, range(len(telling.texts.texts))).float()
    order = telling.ranked(pairs[0].unit(), of_texts)
    along = data @ pairs[0].unit()[:, order[0]].numpy()
    return _Layer(layer, pairs, order, of_texts, torch.from_numpy(np.mean(data, axis=0)), max(float(along.std()), 1e-6))


def _dealt(request: SnmfRequest, chosen: _Layer, tokens: Scratch, telling: Telling, span: Span
           ) -> list[tuple[float, float]]:
    """AUC on test of the groups that dealt neurons make, and the error of their factorisation."""
    found, data, generator = [], tokens.layer(chosen.number), request.generator(1)
    with Scratch([chosen.number], len(data), tokens.width) as other:
        for n in range(DEALS):
            dealt = other.layer(chosen.number)
            shuffled_columns(data, dealt, generator)
            [pair] = _factors(request, dealt, 1, generator, span.part(n, DEALS))
            found.append((telling.best_auc(pair.unit(), chosen.means, request.take), pair.error))
    return found


def _told(chosen: _Layer, telling: Telling, stable: torch.Tensor) -> list[dict[str, Any]]:
    """The first groups for people: their neurons, the train texts in which they are most active, how well they tell."""
    groups, train, found = chosen.pairs[0].unit(), list(telling.texts.splits["train"]), []
    aucs = telling.aucs(groups, chosen.means)
    for group in chosen.order[:SHOWN]:
        column = groups[:, group]
        active = (chosen.means[train] @ column).argsort(descending=True)[:5]
        found.append({"group": group, "train_auc": rounded(aucs[group]), "stability": rounded(float(stable[group])),
                      "neurons": [n for n in column.abs().argsort(descending=True)[:SHOWN].tolist() if column[n] != 0],
                      "examples": [train[i] for i in active.tolist()]})
    return found


def _numbers(form: str, groups: torch.Tensor, chosen: _Layer) -> dict[str, torch.Tensor]:
    """Tensors of the artifact from groups `[f, take]` at unit length."""
    if form == "vector":
        return {"vector": groups[:, 0] * chosen.sigma}
    if form == "subspace":
        left, size, _ = torch.linalg.svd(groups.double(), full_matrices=False)
        return {"basis": left[:, size > 1e-6].T.float()}
    neurons = groups.abs().sum(dim=1).nonzero().flatten()
    return {"neurons": neurons, "value": chosen.resting[neurons]}


def _effect(request: SnmfRequest, chosen: _Layer, numbers: Mapping[str, torch.Tensor], telling: Telling,
            readout: Readout, generator: torch.Generator, span: Span) -> dict[str, Any]:
    """What the log-odds of the readout gain by a vector, or lose without the groups; beside random groups."""
    vector, facts, kind = request.form == "vector", span.work.facts, cast(Kind, request.form)
    prompts = [telling.texts.texts[n] for n in telling.texts.splits["test"] if telling.wanted(n) != vector]
    prompts = prompts[:MOST_READOUT]
    sign, parts, width = 1 if vector else -1, request.draws + 2, facts.width(SITE)

    def measure(tensors: Mapping[str, torch.Tensor], part: int) -> float:
        program = program_of(facts, kind, FORMS[request.form], SITE, {chosen.number: tensors}, scope=EVERYWHERE,
                             strength=request.strength if vector else 1.0)
        return sign * (float(readout.log_odds(prompts, span.part(part, parts), program).mean()) - before)

    before = float(readout.log_odds(prompts, span.part(0, parts)).mean())
    found = measure(numbers, 1)
    draws = []
    for n in range(request.draws):
        groups = random_groups(width, request.take, _kept(request, facts), generator)
        if "neurons" in numbers:
            # As many of them: groups share neurons, random ones hardly do.
            groups = random_groups(width, 1, len(numbers["neurons"]), generator)
        draws.append(measure(_numbers(request.form, groups, chosen), n + 2))
    return {"log_odds_before": rounded(before), **standing(found, draws)}


METHOD = Snmf()
