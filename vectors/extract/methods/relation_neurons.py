"""Relation neurons: units whose response tells prompts of one relation from prompts of others (Liu et al. 2025, arXiv
2502.17355).

What the paper leaves open is decided here: the units are `mlp_act`, the inputs of the down projection; a response is
pooled over all tokens but the first (an attention sink in many models); units of all layers are ranked together by
average precision on train; the default is the best one per cent. Random sets are matched by layer and mean magnitude.
Besides zero, the artifact holds each unit's mean over all tokens, for mode set (mean ablation).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from steering.ops.mask import MaskOptions
from steering.programs.program import Program
from vectors.extract.answers import MOST_QUESTIONS, AnsweredOptions
from vectors.extract.contract import Split
from vectors.extract.contrasts import text_of
from vectors.extract.items import Example, Item, Label, Labelled, labelled
from vectors.extract.matched import matched_draw
from vectors.extract.programs import EVERYWHERE, program_of
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import EmptyText
from vectors.extract.scratch import Scratch
from vectors.extract.standing import rounded, standing
from vectors.extract.subject import Prompt, Subject, answer_logprobs, first_token, stream
from vectors.extract.trial.plan import Question
from vectors.extract.work import Span, Work

UNITS_AT_ONCE = 512
SITE: Literal["mlp_act"] = "mlp_act"
Chosen = Mapping[int, Sequence[int]]


class Fact(Example):
    """A prompt of a relation; with its answer, accuracy with the neurons off is measured, too."""

    text: Prompt = Field(description="Plain text, a conversation or token ids.")
    label: Label = Field(description="The relation.")
    item: Item | None = Field(default=None, description="The entity; facts of one stay in one split.")
    split: Split | None = Field(default=None, description="Fixed split; for all facts or for none.")
    answer: Annotated[str, Field(max_length=4096)] | None = Field(
        default=None, description="What follows, with the space before it.")


class RelationNeuronsRequest(AnsweredOptions):
    """Prompts of several relations."""

    facts: Annotated[list[Fact], Field(min_length=1, max_length=100_000)]
    target: Label = Field(description="The relation whose neurons are wanted.")
    pooling: Literal["max", "mean"] = Field(default="max", description="How a unit's tokens become one response.")
    which: Literal["top", "both"] = Field(default="top", description="top: the most expert units; both: half of them "
                                          "the least expert ones, which are active on the other relations.")
    share: float = Field(default=0.01, gt=0, le=0.5, description="Share of all units to take.")
    mode: Literal["zero", "set"] = Field(default="zero", description="Default mode: zero, or set to the mean.")


class RelationNeurons(Recipe):
    name = "relation_neurons"
    summary = "MLP units that respond to the prompts of one relation"
    request = RelationNeuronsRequest
    ops = ("neuron_mask",)
    sites = (SITE,)
    scope = EVERYWHERE
    effect = "effect_percentile"
    untried = "without the right answers nothing says what their absence should do to an answer"
    chance = {**Recipe.chance, "effect_percentile": "units of equal frequency"}

    def prepare(self, request: RelationNeuronsRequest, subject: Subject) -> tuple[Labelled, list[int] | None]:
        site_layers(request, SITE, subject.facts)
        data = labelled(request.facts, subject, request.seed, param="facts", target=request.target)
        return data, _answers(request, subject)

    def questions(self, request: RelationNeuronsRequest, data: tuple[Labelled, list[int] | None]) -> list[Question]:
        """Held-out facts of the relation, with their answers where these are given."""
        facts, _ = data
        chosen = [n for n in facts.splits["test"] if facts.labels[n] == request.target][:MOST_QUESTIONS]
        return [Question(facts.texts[n], text_of(request.facts[n].text) or "",
                         () if (answer := request.facts[n].answer) is None else (answer.strip(),)) for n in chosen]

    def make(self, request: RelationNeuronsRequest, data: tuple[Labelled, list[int] | None], work: Work) -> Made:
        layers = site_layers(request, SITE, work.facts)
        facts, answers = data
        width = work.facts.width(SITE)
        is_target = torch.tensor([label == request.target for label in facts.labels])
        train, dev, test = (torch.tensor(facts.splits[split]) for split in ("train", "dev", "test"))
        with Scratch(layers, len(facts.texts), width) as store:
            means, size = _responses(request, facts, layers, store, work)
            span = work.within(0.5, 0.65, "fit")
            expertise = _expertise(store, layers, train, is_target[train], span)
            count = max(1, round(request.share * expertise.numel()))
            chosen = _top(layers, expertise, count, request.which)
            found = _held_out(store, layers, test, is_target[test], chosen)
            dev_found = _held_out(store, layers, dev, is_target[dev], chosen)
            generator, span = request.generator(1), work.within(0.65, 0.8, "control")
            drawn = [{layer: matched_draw(units, size[layers.index(layer)], generator)
                      for layer, units in chosen.items()} for _ in range(request.draws)]
            random_draws = [_held_out(store, layers, test, is_target[test], draw) for draw in drawn]
            shuffled_draws = []
            for n in range(request.draws):
                dealt = is_target[train][torch.randperm(len(train), generator=generator)]
                false = _expertise(store, layers, train, dealt, span.part(n, request.draws))
                shuffled_draws.append(_held_out(store, layers, test, is_target[test],
                                                _top(layers, false, count, request.which)))
        control: dict[str, Any] = {"matched_random": standing(found, random_draws),
                                   "shuffled_labels": standing(found, shuffled_draws)}
        report: dict[str, Any] = {
            "method": self.name, "site": SITE, "pooling": request.pooling, "which": request.which,
            "facts": facts.counts(), "units": count,
            "units_by_layer": {str(n): len(units) for n, units in chosen.items()},
            "base_rate": rounded(float(is_target[test].double().mean())),
            "fit": {"best": rounded(float(expertise.max())), "median": rounded(float(expertise.median()))},
            "dev": {"average_precision": rounded(dev_found)}, "test": {"average_precision": rounded(found)},
            "controls": control}
        numbers = {layer: {"neurons": torch.tensor(units), "value": means[layers.index(layer)][units]}
                   for layer, units in chosen.items()}
        card: dict[str, Any] = {
            "units": count, "base_rate": report["base_rate"],
            "random_percentile": control["matched_random"]["percentile"],
            "shuffled_percentile": control["shuffled_labels"]["percentile"]}
        if answers is not None:
            report["effect"] = self._effect(request, facts, answers, is_target, chosen, drawn, numbers, work)
            card["effect_percentile"] = report["effect"]["target_logprob_drop"]["percentile"]
        return Made(kind="neuron_set", op="neuron_mask", site=SITE, numbers=numbers,
                    options=MaskOptions(mode=request.mode).model_dump(include={"mode"}),
                    sign_convention="switching these units off is meant to remove the relation", report=report,
                    dev=report["dev"], test=report["test"], card=card,
                    data={"data_hash": facts.digest, "num_facts": len(facts.texts), "target": request.target})

    def _effect(self, request: RelationNeuronsRequest, data: Labelled, answers: Sequence[int], is_target: torch.Tensor,
                chosen: Chosen, drawn: Sequence[Chosen], numbers: Mapping[int, Mapping[str, torch.Tensor]], work: Work
                ) -> dict[str, Any]:
        """Accuracy, and log-probability of the answer's first token, on test with the units off: of the relation and of
        the others."""
        test = data.splits["test"]
        texts = [data.texts[n] for n in test]
        right = torch.tensor([answers[n] for n in test])
        inside = is_target[list(test)]
        span = work.within(0.8, 1.0, "control")

        def measure(program: Program | None, part: Span) -> dict[str, float]:
            found = answer_logprobs(work.subject, texts, part, program)
            hit = (found.argmax(dim=1) == right).double()
            logprob = found.gather(1, right.unsqueeze(1)).squeeze(1)
            return {"target": float(hit[inside].mean()), "others": float(hit[~inside].mean()),
                    "target_logprob": float(logprob[inside].mean()), "others_logprob": float(logprob[~inside].mean())}

        def off(units: Chosen) -> Program:
            return program_of(work.facts, "neuron_set", "neuron_mask", SITE,
                              {n: {"neurons": torch.tensor(list(which))} for n, which in units.items()},
                              scope=EVERYWHERE)

        before = measure(None, span.part(0, len(drawn) + 2))
        after = measure(off(chosen), span.part(1, len(drawn) + 2))
        random = [measure(off(units), span.part(n + 2, len(drawn) + 2)) for n, units in enumerate(drawn)]
        return {"before": {name: rounded(value) for name, value in before.items()},
                "after": {name: rounded(value) for name, value in after.items()},
                **{f"{name}_drop": standing(before[name] - after[name], [before[name] - draw[name] for draw in random])
                   for name in before}}


def average_precision(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per column of `scores [n, units]`: sum over thresholds of precision times the recall gained there; equal scores
    share a threshold. `[units]`."""
    ordered, order = scores.sort(dim=0, descending=True)
    hits = labels.double()[order].cumsum(dim=0)
    precision = hits / torch.arange(1, len(labels) + 1, dtype=torch.float64).unsqueeze(1)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[:-1] != ordered[1:]
    # The recall gained at a threshold is that since the threshold before: hits at the last row of each run of equals.
    at_ends = torch.where(last, hits, torch.zeros_like(hits)).cummax(dim=0).values
    before = torch.cat([torch.zeros(1, scores.shape[1], dtype=torch.float64), at_ends[:-1]])
    gained: torch.Tensor = torch.where(last, precision * (hits - before), 0.0).sum(dim=0)
    return gained / labels.sum()


def _responses(request: RelationNeuronsRequest, data: Labelled, layers: Sequence[int], store: Scratch, work: Work
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `store` with pooled responses; mean and mean magnitude of each unit over all tokens, `[num_layers, f]`."""
    width = work.facts.width(SITE)
    total, size = (torch.zeros(len(layers), width, dtype=torch.float64) for _ in range(2))
    count = 0
    for n, found in stream(work.subject, data.texts, SITE, layers, None, work.within(0.0, 0.5, "capture")):
        for i, layer in enumerate(layers):
            h = found[layer][1:] if len(found[layer]) > 1 else found[layer]
            store.put(layer, n, h.max(dim=0).values if request.pooling == "max" else h.mean(dim=0))
            total[i] += h.double().sum(dim=0)
            size[i] += h.double().abs().sum(dim=0)
        count += max(1, len(data.texts[n]) - 1)
    return total / count, size / count


def _expertise(store: Scratch, layers: Sequence[int], members: torch.Tensor, labels: torch.Tensor, span: Span
               ) -> torch.Tensor:
    """Average precision of every unit, `[num_layers, f]`."""
    rows = []
    for i, layer in enumerate(layers):
        span(i / len(layers))
        parts = (store.rows(layer, members.tolist(), slice(start, start + UNITS_AT_ONCE))
                 for start in range(0, store.width, UNITS_AT_ONCE))
        rows.append(torch.cat([average_precision(part, labels) for part in parts]))
    return torch.stack(rows)


def _top(layers: Sequence[int], expertise: torch.Tensor, count: int, which: str) -> Chosen:
    order = torch.argsort(expertise.flatten(), descending=True, stable=True).tolist()
    places = order[:count] if which == "top" else [*order[:count - count // 2], *order[len(order) - count // 2:]]
    taken: dict[int, list[int]] = {}
    for place in sorted(places):
        row, unit = divmod(place, expertise.shape[1])
        taken.setdefault(layers[row], []).append(unit)
    return taken


def _held_out(store: Scratch, layers: Sequence[int], test: torch.Tensor, labels: torch.Tensor, chosen: Chosen
              ) -> float:
    """Mean average precision of the chosen units on held-out facts; units chosen for low precision count less."""
    found = [average_precision(store.rows(layer, test.tolist())[:, list(units)], labels)
             for layer, units in chosen.items()]
    return float(torch.cat(found).mean())


def _answers(request: RelationNeuronsRequest, subject: Subject) -> list[int] | None:
    """First tokens of the answers, None if no fact has one.

    Raises:
        EmptyText: some facts have an answer and this one has not.
    """
    if all(fact.answer is None for fact in request.facts):
        return None
    found = []
    for n, fact in enumerate(request.facts):
        if fact.answer is None:
            raise EmptyText("this fact has no answer, others have", param=("facts", n, "answer"),
                            fix="Give answers to all facts or to none.")
        found.append(first_token(subject, fact.answer, ("facts", n, "answer")))
    return found


METHOD = RelationNeurons()
