"""Tunable experts: the routed experts whose use differs between prompts that show a behaviour and others (MoTE, 2025,
arXiv 2502.11096; SteerMoE, 2025, arXiv 2509.09660).

What the paper leaves open is decided here: usage is the share of a prompt's tokens that choose an expert, so long
prompts count no more than short ones (`ftri`); `risk_difference` pools tokens instead, as SteerMoE does. One ranking
over all layers. The label of a prompt is given; where it should come from the model's own answer, give `markers`
instead: prompts whose greedy answer contains one of them show the behaviour. All prompt tokens count alike, as in the
paper; `position: last` counts only the token that the answer is predicted at, where a template's fixed tokens weigh
less. Random sets are matched by layer and by selection frequency.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from steering.language.fields import Model
from steering.ops.expert_mask import ExpertMaskOptions
from vectors.extract.answers import MOST_QUESTIONS, AnsweredOptions
from vectors.extract.contract import Split
from vectors.extract.contrasts import text_of
from vectors.extract.items import Example, Item, Label, Labelled, labelled
from vectors.extract.matched import matched_draw
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import FitFailed
from vectors.extract.scratch import Scratch
from vectors.extract.standing import auc, rounded, standing
from vectors.extract.subject import Prompt, Subject, Tokens, batches, encoded
from vectors.extract.trial.plan import Question
from vectors.extract.usage import check_routers, read_usage, usage
from vectors.extract.work import Work

SHOWN, NOT_SHOWN = "shown", "not shown"
Chosen = Mapping[int, Sequence[int]]


class ExpertPrompt(Model):
    """A prompt, with its label unless the model's own answer decides."""

    text: Prompt = Field(description="Plain text, a conversation or token ids.")
    label: Label | None = Field(default=None, description="Its class.")
    item: Item | None = Field(default=None, description="What it is about.")
    split: Split | None = Field(default=None, description="Fixed split; for all prompts or for none.")


class TunableExpertsRequest(AnsweredOptions):
    """Prompts that show a behaviour and prompts that do not."""

    examples: Annotated[list[ExpertPrompt], Field(min_length=1, max_length=100_000)]
    target: Label = Field(default=SHOWN, description="Label of the prompts that show the behaviour.")
    markers: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=64)] = Field(
        default=[], description="Instead of labels: texts one of which stands in the answer that shows the behaviour.")
    max_tokens: int = Field(default=24, ge=1, le=512, description="Length of the answers searched for markers.")
    statistic: Literal["ftri", "risk_difference"] = Field(
        default="ftri", description="ftri: mean over prompts; risk_difference: pooled over tokens.")
    position: Literal["all", "last"] = Field(default="all", description="Prompt tokens whose choice counts; last: only "
                                             "the one that the answer is predicted at.")
    direction: Literal["promoted", "demoted", "both"] = Field(
        default="promoted", description="Experts used more, used less, or either, by the prompts that show it.")
    num_experts: int = Field(default=10, ge=1, le=65_536, description="Experts to take, over all layers.")
    per_layer: int | None = Field(default=None, ge=1, description="Most experts of one layer; mode force needs at most "
                                  "as many as a token has.")
    mode: Literal["off", "off_refill", "force", "scale", "bias"] = Field(
        default="off", description="Default mode of the artifact.")

    @model_validator(mode="after")
    def _labels_or_markers(self) -> Self:
        given = sum(example.label is not None for example in self.examples)
        if self.markers and given:
            raise ValueError("give labels or markers, not both")
        if not self.markers and given < len(self.examples):
            raise ValueError("every example needs a label, or give markers")
        if self.markers and self.target != SHOWN:
            raise ValueError(f'with markers the target is "{SHOWN}"')
        return self


class TunableExperts(Recipe):
    name = "tunable_experts"
    summary = "experts of a mixture that prompts with a behaviour use more, or less, than others"
    request = TunableExpertsRequest
    ops = ("expert_mask",)
    sites = ("router",)
    untried = "labelled prompts do not say what the model should answer to them with other experts"

    def prepare(self, request: TunableExpertsRequest, subject: Subject) -> Labelled | list[Tokens]:
        site_layers(request, "router", subject.facts)
        check_routers(subject.facts)
        if request.markers:
            return [encoded(subject, example.text, ("examples", n, "text"))
                    for n, example in enumerate(request.examples)]
        return _labelled(request, [example.label for example in request.examples], subject)

    def questions(self, request: TunableExpertsRequest, data: Labelled | list[Tokens]) -> list[Question]:
        """Held-out prompts that show the behaviour, where labels say which do."""
        if not isinstance(data, Labelled):
            return []
        chosen = [n for n in data.splits["test"] if data.labels[n] == request.target][:MOST_QUESTIONS]
        return [Question(data.texts[n], text_of(request.examples[n].text) or "") for n in chosen]

    def make(self, request: TunableExpertsRequest, data: Labelled | list[Tokens], work: Work) -> Made:
        layers = site_layers(request, "router", work.facts)
        shown = data if isinstance(data, Labelled) else _shown(request, data, work)
        with Scratch(layers, len(shown.texts), work.facts.num_experts) as store:
            read_usage(work.subject, shown.texts, store, work.within(0.2, 0.7, "capture"),
                       None if request.position == "all" else [-1])
            lengths = torch.tensor([float(len(text)) for text in shown.texts], dtype=torch.float64)
            is_target = torch.tensor([label == request.target for label in shown.labels])
            train, dev, test = (torch.tensor(shown.splits[split]) for split in ("train", "dev", "test"))

            def difference(members: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                sides = []
                for side in (members[labels], members[~labels]):
                    weights = lengths[side] if request.statistic == "risk_difference" else None
                    sides.append(usage(store, side.tolist(), weights))
                return sides[0] - sides[1]

            fitted = difference(train, is_target[train])
            chosen = _top(request, layers, fitted)
            held_out = difference(test, is_target[test])
            frequency = usage(store, train.tolist())
            found = _sum(held_out, fitted, layers, chosen)
            score = _auc(store, layers, test, is_target, chosen, fitted)
            dev_found = _sum(difference(dev, is_target[dev]), fitted, layers, chosen)
            dev_score = _auc(store, layers, dev, is_target, chosen, fitted)
            generator, span = request.generator(1), work.within(0.75, 1.0, "control")
            random_draws, random_aucs, shuffled_draws = [], [], []
            for n in range(request.draws):
                span(n / request.draws)
                drawn = {layer: matched_draw(units, frequency[layers.index(layer)], generator)
                         for layer, units in chosen.items()}
                random_draws.append(_sum(held_out, fitted, layers, drawn))
                random_aucs.append(_auc(store, layers, test, is_target, drawn, fitted))
                dealt = is_target[train][torch.randperm(len(train), generator=generator)]
                false = difference(train, dealt)
                shuffled_draws.append(_sum(held_out, false, layers, _top(request, layers, false)))
        control = {"matched_random": standing(found, random_draws), "matched_random_auc": standing(score, random_aucs),
                   "shuffled_labels": standing(found, shuffled_draws)}
        report: dict[str, Any] = {
            "method": self.name, "statistic": request.statistic, "position": request.position,
            "direction": request.direction,
            "examples": shown.counts(), "target_share": rounded(float(is_target.double().mean())),
            "experts": [{"layer": layer, "expert": unit, "fit": rounded(float(fitted[layers.index(layer), unit])),
                         "test": rounded(float(held_out[layers.index(layer), unit])),
                         "frequency": rounded(float(frequency[layers.index(layer), unit]))}
                        for layer, units in chosen.items() for unit in units],
            **{split: {"usage_difference": rounded(total / sum(map(len, chosen.values()))), "auc": rounded(area)}
               for split, total, area in (("dev", dev_found, dev_score), ("test", found, score))},
            "controls": control}
        return Made(
            kind="expert_set", op="expert_mask", site="router",
            numbers={layer: {"experts": torch.tensor(sorted(units))} for layer, units in chosen.items()},
            options=ExpertMaskOptions(mode=request.mode).model_dump(exclude_defaults=True) or {"mode": request.mode},
            sign_convention="experts that the prompts with the behaviour use "
                            + {"promoted": "more", "demoted": "less", "both": "more or less"}[request.direction],
            report=report, data={"data_hash": shown.digest, "num_examples": len(shown.texts), "target": request.target},
            dev=report["dev"], test=report["test"],
            card={"experts": sum(map(len, chosen.values())),
                  "random_percentile": control["matched_random"]["percentile"],
                  "shuffled_percentile": control["shuffled_labels"]["percentile"]})


def _shown(request: TunableExpertsRequest, texts: Sequence[Tokens], work: Work) -> Labelled:
    """Labels are read from the model's own answers."""
    labels = [NOT_SHOWN] * len(texts)
    span = work.within(0.0, 0.2, "capture")
    for batch in batches(texts):
        span(batch.start / len(texts))
        for n, said in zip(batch, work.subject.generate([texts[n] for n in batch], request.max_tokens), strict=True):
            labels[n] = SHOWN if any(marker in said for marker in request.markers) else NOT_SHOWN
    return _labelled(request, labels, work.subject)


def _labelled(request: TunableExpertsRequest, labels: Sequence[str | None], subject: Subject) -> Labelled:
    examples = [Example(text=example.text, label=label or NOT_SHOWN, item=example.item, split=example.split)
                for example, label in zip(request.examples, labels, strict=True)]
    return labelled(examples, subject, request.seed, target=request.target)


def _top(request: TunableExpertsRequest, layers: Sequence[int], difference: torch.Tensor) -> Chosen:
    """The first experts of the one ranking over all layers, `difference [num_layers, E]`."""
    value = {"promoted": difference, "demoted": -difference, "both": difference.abs()}[request.direction]
    taken: dict[int, list[int]] = {}
    count = 0
    for place in torch.argsort(value.flatten(), descending=True, stable=True).tolist():
        row, unit = divmod(place, value.shape[1])
        if count == request.num_experts or not float(value[row, unit]) > 0:
            break
        if request.per_layer is not None and len(taken.get(layers[row], [])) == request.per_layer:
            continue
        taken.setdefault(layers[row], []).append(unit)
        count += 1
    if not taken:
        raise FitFailed("no expert is used differently", param="examples", fix="Give prompts that differ more.")
    return taken


def _sum(held_out: torch.Tensor, fitted: torch.Tensor, layers: Sequence[int], chosen: Chosen) -> float:
    """How far the chosen experts' use differs on held-out prompts, in the direction that was fitted."""
    return sum(float(held_out[layers.index(layer), unit] * torch.sign(fitted[layers.index(layer), unit]))
               for layer, units in chosen.items() for unit in units)


def _auc(store: Scratch, layers: Sequence[int], test: torch.Tensor, is_target: torch.Tensor, chosen: Chosen,
         fitted: torch.Tensor) -> float:
    """How well the chosen experts' use tells held-out prompts apart."""
    score = torch.zeros(len(test), dtype=torch.float64)
    for layer, units in chosen.items():
        signs = torch.sign(fitted[layers.index(layer), list(units)])
        score += (store.rows(layer, test.tolist())[:, list(units)] * signs).sum(dim=1)
    return auc(score[is_target[test]], score[~is_target[test]])


METHOD = TunableExperts()
