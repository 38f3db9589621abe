"""Function vectors: from in-context examples, a vector that makes the model do the task (Nadaf 2026, arXiv 2604.02608;
Todd et al. 2024, arXiv 2310.15213).

What the paper leaves open is decided here: answers are scored by their first token in the spelling that follows the
prompt (with its space); demonstrations are lines; pairs of one input stay in one split, demonstrations come from train
only; layer and strength are chosen on dev, by accuracy and then by mean log-probability of the answer, and test is read
once. Demonstrations whose outputs were dealt anew still show what kind of thing answers are. Where that alone gives the
task away (plurals, French nouns), their vector steers as well, and the control that tells is another task's vector:
give `other_pairs`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from steering.language.strength import Strength
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from vectors.extract.answers import MOST_QUESTIONS, AnsweredOptions
from vectors.extract.head_average import causal_heads, mean_heads, summed
from vectors.extract.programs import NEXT, adding
from vectors.extract.prompts_icl import Task, TaskPair, Template, make_task
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import FitFailed
from vectors.extract.standing import random_like, rounded, share_error, standing
from vectors.extract.subject import Subject, Tokens, answer_logprobs, stream
from vectors.extract.trial.plan import Question
from vectors.extract.work import Span, Work

SITE: Site = "resid_post"
# Layers and strengths that are all tried on all of dev; with more, SCOUTS items say which layers are.
MOST_POINTS, SCOUTS = 60, 12
Point = tuple[int, float]


SUNK = ("the template begins with the word, and the model's tokenizer puts no mark before it: the word is the first "
        "token of all, which many models use as a sink, so that they may not be able to read it; let something stand "
        "before the slot, as in '- {x} ->'")


class FunctionVectorRequest(AnsweredOptions):
    """Word pairs of one task."""

    pairs: Annotated[list[TaskPair], Field(min_length=1, max_length=20_000)]
    other_pairs: Annotated[list[TaskPair], Field(max_length=20_000)] = Field(
        default=[], description="Pairs of another task, whose vector of equal length is a control.")
    single_token: bool = Field(default=False, description="Leave out pairs whose output is more than one token to the "
                               "model.")
    template: Template = Field(default="{x} ->", description="A prompt with one slot, {x}. Where the model's tokenizer "
                               "puts no mark at the beginning, let something stand before the slot: - {x} ->")
    extraction: Literal["mean_difference", "causal_mediation"] = Field(
        default="mean_difference", description="mean_difference: few-shot minus zero-shot activations; "
        "causal_mediation: summed outputs of the heads that cause the answer.")
    shots: int | None = Field(default=None, ge=1, le=64, description="Demonstrations; 5, or 10 for causal_mediation.")
    num_prompts: int | None = Field(default=None, ge=2, le=1000,
                                    description="Prompts averaged over; 15, or 100 for causal_mediation.")
    num_shuffled: int = Field(default=25, ge=2, le=1000, description="Shuffled prompts for causal scores.")
    num_heads: int = Field(default=10, ge=1, le=1024, description="Heads summed by causal_mediation.")
    strengths: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(min_length=1, max_length=32)] = Field(
        default=[0.5, 1.0, 1.5, 2.0, 3.0, 4.0], description="Strengths tried on dev.")
    max_eval: int = Field(default=50, ge=5, le=1000, description="Most items of dev and of test to score.")

    @property
    def demonstrations(self) -> int:
        return self.shots if self.shots is not None else 10 if self.extraction == "causal_mediation" else 5


class FunctionVector(Recipe):
    name = "function_vector"
    summary = "vector that makes the model do a task shown in context"
    request = FunctionVectorRequest
    ops = ("add",)
    sites = (SITE,)
    # On later tokens the vector would make each begin an answer anew: "Buchsowen" for Bucharest on SmolLM2.
    scope = NEXT
    effect = "random_percentile"
    # Dealt demonstrations still show what kind of thing answers are, and their vector may do as well.
    chance = {"random_percentile": "random vectors"}

    def prepare(self, request: FunctionVectorRequest, subject: Subject) -> tuple[Task, Task | None]:
        site_layers(request, SITE, subject.facts)
        if request.extraction == "causal_mediation":
            for layer in range(subject.facts.num_layers):
                subject.facts.check_site("head_out", layer, "extraction")
        task, other = (make_task(pairs, request.template, request.demonstrations, subject, request.seed, param=param,
                                 single_token=request.single_token) if pairs else None
                       for pairs, param in ((request.pairs, "pairs"), (request.other_pairs, "other_pairs")))
        assert task is not None
        return task, other

    def questions(self, request: FunctionVectorRequest, data: tuple[Task, Task | None]) -> list[Question]:
        """Zero-shot prompts with the answers that the task has."""
        task = data[0]
        return [Question(task.zero_shot(n), task.inputs[n], (task.outputs[n].strip(),))
                for n in task.splits["test"][:MOST_QUESTIONS]]

    def passes(self, request: FunctionVectorRequest, data: tuple[Task, Task | None], facts: ModelFacts) -> int | None:
        if request.extraction == "causal_mediation":
            return None
        task = data[0]
        bare = fmean(len(task.zero_shot(n)) for n in task.splits["train"])
        # A demonstration has an input, an output and a line break.
        shown = bare + request.demonstrations * (bare + 2)
        layers, strengths = len(site_layers(request, SITE, facts)), len(request.strengths)
        dev, test, train = (min(request.max_eval, len(task.splits[split])) for split in ("dev", "test", "train"))
        fitting = min(request.num_prompts or 15, train) * (shown + bare)
        points = layers * strengths
        tried = points * dev if points <= MOST_POINTS else 2 * layers * min(SCOUTS, dev) + MOST_POINTS // 2 * dev
        return round(fitting + len(task.splits["train"]) * bare + tried * bare
                     + request.draws * (fitting + 2 * test * bare) + test * (shown + 2 * bare))

    def make(self, request: FunctionVectorRequest, data: tuple[Task, Task | None], work: Work) -> Made:
        causal = request.extraction == "causal_mediation"
        shots = request.demonstrations
        task, other_task = data
        layers = site_layers(request, SITE, work.facts)
        finder = _Causal(request, task, shots, work) if causal else _Difference(request, shots)
        chance = random.Random(request.seed)
        if isinstance(finder, _Causal):
            vectors = finder.search(layers, chance, work.within(0.0, 0.4, "capture"))
        else:
            vectors = finder.of(task, layers, chance, work.within(0.0, 0.4, "capture"))
        usable = [layer for layer in layers if float(vectors[layer].norm()) > 0]
        if not usable:
            raise FitFailed("the vector is zero at every layer", param="pairs")
        norms, sigma = _sizes(task, usable, vectors, work.within(0.4, 0.45, "capture"))

        dev, test = (list(task.splits[split][:request.max_eval]) for split in ("dev", "test"))
        def accuracies(points: Sequence[Point], items: Sequence[int], span: Span) -> dict[Point, tuple[float, float]]:
            return {point: _accuracy(task, items, span.part(n, len(points)), adding(
                work.facts, SITE, point[0], point[1] * vectors[point[0]])) for n, point in enumerate(points)}

        grid = _narrowed(request, usable, lambda points: accuracies(points, dev[:SCOUTS],
                                                                    work.within(0.45, 0.55, "fit")))
        tried = accuracies(grid, dev, work.within(0.55, 0.7, "fit"))
        layer, strength = max(grid, key=lambda point: (*tried[point], -point[0], -point[1]))
        best = strength * vectors[layer]

        span = work.within(0.7, 1.0, "control")
        draws = request.draws
        found = _accuracy(task, test, span.part(0, 2 * draws + 2), adding(work.facts, SITE, layer, best))
        generator = request.generator(1)
        random_draws, shuffled_draws = [], []
        for n in range(draws):
            program = adding(work.facts, SITE, layer, random_like(best, generator))
            random_draws.append(_accuracy(task, test, span.part(2 * n + 1, 2 * draws + 2), program))
            part = span.part(2 * n + 2, 2 * draws + 2)
            other = finder.of(task, [layer], chance, part.part(0, 2), shuffled=True)[layer]
            program = adding(work.facts, SITE, layer, other * (best.norm() / other.norm()))
            shuffled_draws.append(_accuracy(task, test, part.part(1, 2), program))
        few = _scored(task, [task.few_shot(n, shots, chance) for n in test], test, span.part(2 * draws + 1,
                                                                                            2 * draws + 2), None)
        zero = _accuracy(task, test, span.part(2 * draws + 1, 2 * draws + 2), None)
        report: dict[str, Any] = {
            "method": self.name, "extraction": request.extraction, "shots": shots, "site": SITE,
            "pairs": {split: len(members) for split, members in task.splits.items()},
            "pairs_left_out": len(request.pairs) - len(task.inputs), "best_layer": layer, "best_strength": strength,
            "dev": {str(n): {str(c): rounded(tried[n, c][0]) for c in request.strengths if (n, c) in tried}
                    for n in sorted({point[0] for point in tried})},
            "test": {"items": len(test), "zero_shot": rounded(zero[0]), "few_shot": rounded(few[0]),
                     "steered": rounded(found[0]), "steered_error": rounded(share_error(found[0], len(test))),
                     "logprob_gain": rounded(found[1] - zero[1])},
            "controls": {
                "random_vectors": standing(found[0], [draw[0] for draw in random_draws]),
                "random_vectors_logprob": standing(found[1], [draw[1] for draw in random_draws]),
                "shuffled_demonstrations": standing(found[0], [draw[0] for draw in shuffled_draws]),
                "shuffled_demonstrations_logprob": standing(found[1], [draw[1] for draw in shuffled_draws])},
            **finder.extra(), **({"warnings": [SUNK]} if _sunk(request, task) else {}),
        }
        if other_task is not None:
            other = finder.of(other_task, [layer], chance, span.part(2 * draws + 1, 2 * draws + 2))[layer]
            program = adding(work.facts, SITE, layer, other * (best.norm() / other.norm()))
            reached = _accuracy(task, test, span.part(2 * draws + 1, 2 * draws + 2), program)
            report["controls"]["other_task"] = {"accuracy": rounded(reached[0]), "logprob": rounded(reached[1])}
        return Made(
            kind="vector", op="add", site=SITE, numbers={n: {"vector": vectors[n]} for n in usable},
            sign_convention="positive strength makes the model do the task", report=report,
            dev={"accuracy": rounded(tried[layer, strength][0])},
            test={"accuracy": rounded(found[0]), "accuracy_error": rounded(share_error(found[0], len(test))),
                  "zero_shot": rounded(zero[0]), "few_shot": rounded(few[0])},
            card={"random_percentile": report["controls"]["random_vectors"]["percentile"],
                  "shuffled_percentile": report["controls"]["shuffled_demonstrations"]["percentile"]},
            data={"data_hash": task.digest, "num_pairs": len(task.inputs), "template": request.template},
            default_layers=[layer], strength=Strength(value=strength), residual_norm=norms, sigma=sigma)


def _narrowed(request: FunctionVectorRequest, layers: Sequence[int],
              accuracies: Callable[[Sequence[Point]], Mapping[Point, tuple[float, float]]]) -> list[Point]:
    """Layers and strengths to try on all of dev. Where there are more than MOST_POINTS, some items at two strengths say
    which layers are worth it."""
    grid = [(layer, strength) for layer in layers for strength in request.strengths]
    if len(grid) <= MOST_POINTS:
        return grid
    ordered = sorted(request.strengths)
    two = {ordered[len(ordered) // 3], ordered[2 * len(ordered) // 3]}
    found = accuracies([point for point in grid if point[1] in two])
    ranked = sorted(layers, key=lambda layer: max(value for point, value in found.items() if point[0] == layer),
                    reverse=True)
    kept = set(ranked[:max(1, MOST_POINTS // (2 * len(ordered)))])
    return [point for point in grid if point[0] in kept]


class _Difference:
    """Mean activation of few-shot prompts minus that of the bare queries, per layer."""

    def __init__(self, request: FunctionVectorRequest, shots: int) -> None:
        self.shots = shots
        self.num_prompts = request.num_prompts or 15

    def of(self, task: Task, layers: Sequence[int], chance: random.Random, span: Span, *, shuffled: bool = False
           ) -> dict[int, torch.Tensor]:
        train = list(task.splits["train"])
        queries = chance.sample(train, min(self.num_prompts, len(train)))
        shown = [task.few_shot(n, self.shots, chance, shuffled=shuffled) for n in queries]
        bare = [task.zero_shot(n) for n in queries]
        sums = {layer: torch.zeros(task.subject.facts.d_model, dtype=torch.float64) for layer in layers}
        for prompts, sign, part in ((shown, 1, span.part(0, 2)), (bare, -1, span.part(1, 2))):
            for _, found in stream(task.subject, prompts, SITE, layers, [-1], part):
                for layer in layers:
                    sums[layer] += sign * found[layer][0].double()
        return {layer: total / len(queries) for layer, total in sums.items()}

    def extra(self) -> dict[str, Any]:
        return {}


class _Causal:
    """One vector for all layers. Controls keep the heads and take their means from other demonstrations."""

    def __init__(self, request: FunctionVectorRequest, task: Task, shots: int, work: Work) -> None:
        self.request, self.task, self.shots = request, task, shots
        self.num_prompts = request.num_prompts or 100
        self.head_layers = sorted(work.facts.sites.get("head_out", ()))
        self.heads: list[tuple[int, int]] = []
        self.effects: dict[tuple[int, int], float] = {}

    def search(self, layers: Sequence[int], chance: random.Random, span: Span) -> dict[int, torch.Tensor]:
        found = causal_heads(self.task, self.head_layers, self.shots, self.num_prompts, self.request.num_shuffled,
                             chance, span)
        self.heads, self.effects = found.top(self.request.num_heads), found.effects
        return dict.fromkeys(layers, summed(self.task, found.means, self.heads))

    def of(self, task: Task, layers: Sequence[int], chance: random.Random, span: Span, *, shuffled: bool = False
           ) -> dict[int, torch.Tensor]:
        means = mean_heads(task, self.head_layers, self.shots, self.num_prompts, chance, span, shuffled=shuffled)
        return dict.fromkeys(layers, summed(task, means, self.heads))

    def extra(self) -> dict[str, Any]:
        return {"heads": [{"layer": layer, "head": head, "effect": rounded(self.effects[layer, head])}
                          for layer, head in self.heads]}


def _accuracy(task: Task, items: Sequence[int], span: Span, program: Program | None) -> tuple[float, float]:
    return _scored(task, [task.zero_shot(n) for n in items], items, span, program)


def _scored(task: Task, prompts: Sequence[Tokens], items: Sequence[int], span: Span, program: Program | None
            ) -> tuple[float, float]:
    """Share of items whose answer's first token is the most likely one, and its mean log-probability."""
    answers = torch.tensor([task.answers[n] for n in items])
    logprobs = answer_logprobs(task.subject, prompts, span, program)
    chosen = logprobs.gather(1, answers.unsqueeze(1)).squeeze(1)
    return float((logprobs.argmax(dim=1) == answers).double().mean()), float(chosen.mean())


def _sunk(request: FunctionVectorRequest, task: Task) -> bool:
    """Whether the first token of a bare query is the word's own. On SmolLM2 no layer or strength then gives a plural on
    dev, and with a dash before the word nearly every layer of the last third gives all of them."""
    own = task.subject.encode_continuation(task.inputs[0])
    return request.template.startswith("{x}") and task.zero_shot(0)[0] == own[0]


def _sizes(task: Task, layers: Sequence[int], vectors: dict[int, torch.Tensor], span: Span
           ) -> tuple[dict[int, float], dict[int, float]]:
    """Per layer: mean length of the bare queries' activations, and their spread along the vector."""
    lengths: dict[int, list[float]] = {layer: [] for layer in layers}
    along: dict[int, list[float]] = {layer: [] for layer in layers}
    for _, found in stream(task.subject, [task.zero_shot(n) for n in task.splits["train"]], SITE, layers, [-1], span,
                           without_massive=True):
        for layer in layers:
            h = found[layer][0].double()
            lengths[layer].append(float(h.norm()))
            along[layer].append(float(h @ vectors[layer] / vectors[layer].norm()))
    spread = {layer: float(torch.tensor(values).std(correction=0)) for layer, values in along.items()}
    return ({layer: sum(values) / len(values) for layer, values in lengths.items()},
            {layer: value for layer, value in spread.items() if value > 0})


METHOD = FunctionVector()
