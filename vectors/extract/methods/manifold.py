"""Manifold steering: the curve or surface on which a concept's values lie, and that of their answers (Wurgaft et al.
2026, arXiv 2605.05115).

Texts are labelled with the true answer and read at the last token. Per layer, on train: principal subspace, a centroid
per label, a spline through them. A layer whose centroids do not come in the order of the labels (cyclic), or are no
nearer to their neighbours than in random orders (sequential, graph), holds no such manifold and is passed over. Of the
others, the one whose swaps move the answer on dev (within 0.05 of the best), and of those the one with the least
energy. On test: swaps onto labels beside centroids of dealt labels and beside random subspaces of the same rank; walks
along the manifold beside the chord, the chord at the manifold's distance from the mean, and splines with dealt knots.

What the paper leaves open is decided here: only the subspace is replaced in all walks, chords too; a swap counts when
the answer's distribution is nearest to the value's natural one, which serves values with several right answers;
sequential knots are arc lengths; surfaces are thin-plate splines. Left out: finding activations by gradient for outputs
on the behaviour manifold.
"""

from collections.abc import Sequence
from math import factorial
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from steering.artifacts.spline import MAX_KNOTS, MAX_RANK, Manifold
from steering.language.errors import InvalidPayload, InvalidRequest
from steering.language.fields import MAX_FLOAT, Finite, Label
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from vectors.extract.behaviour import Answers, Behaviour
from vectors.extract.items import Examples, Labelled, labelled
from vectors.extract.manifold_fit import Fit, Layout, fit
from vectors.extract.manifold_report import dev_swaps, dev_walks, swaps, walks
from vectors.extract.manifold_trial import Trial
from vectors.extract.programs import NEXT
from vectors.extract.recipe import Made, Recipe, RecipeOptions, site_layers
from vectors.extract.refusals import AnswerInPrompt, FitFailed, NoContrast, OneClass, TooFewExamples
from vectors.extract.scratch import Scratch
from vectors.extract.standing import rounded
from vectors.extract.subject import Subject, answer_logprobs, first_token, stream
from vectors.extract.work import Work

SITE: Site = "resid_post"
ORDER_P = 0.05
SWAP_MARGIN = 0.05
# Layers whose walks are tried on dev.
MOST_WALKED = 4
# Some prompts may name their answer, "seven days after Monday" say; where many do, nothing need be worked out.
MOST_HOLDING = 0.5
Coordinates = Annotated[list[Finite], Field(min_length=1, max_length=3)]


class ManifoldRequest(RecipeOptions):
    """Prompts whose answers range over the values of a concept."""

    examples: Examples
    layout: Literal["cyclic", "sequential", "graph"] = Field(
        default="cyclic", description="How the values lie to one another.")
    order: Annotated[list[Label], Field(max_length=MAX_KNOTS)] = Field(
        default=[], description="The values in their order (cyclic, sequential).")
    coordinates: dict[Label, Coordinates] = Field(
        default={}, description="Where each value lies (graph): two or three coordinates, neighbours one apart.")
    period: Annotated[list[Annotated[float, Field(ge=0, le=MAX_FLOAT)]], Field(max_length=3)] = Field(
        default=[], description="Length of each axis of a graph that wraps, 0 for those that do not; empty: none does.")
    answers: dict[Label, Annotated[list[str], Field(min_length=1, max_length=32)]] = Field(
        default={}, description="Spellings of each value as an answer, by their first tokens; empty: those of the "
        "label, with and without a space, that are one token.")
    rank: int = Field(default=64, ge=2, le=MAX_RANK, description="Dimensions of the subspace, at most.")
    check_order: bool = Field(default=True, description="Pass over layers where the values do not lie in their order.")
    steps: int = Field(default=6, ge=3, le=200, description="Points of a walk.")
    max_eval: int = Field(default=4, ge=1, le=200, description="Most base prompts of dev and of test.")
    max_pairs: int = Field(default=12, ge=4, le=2000, description="Most pairs of values to walk between.")

    @model_validator(mode="after")
    def _laid_out(self) -> Self:
        if self.layout == "graph":
            if self.order or not self.coordinates:
                raise ValueError("a graph is laid out by coordinates")
            axes = {len(values) for values in self.coordinates.values()}
            if len(axes) != 1 or axes == {1}:
                raise ValueError("every value of a graph has as many coordinates, two or three; use sequential for one")
            if self.period and len(self.period) != axes.pop():
                raise ValueError("period has a number for every axis")
        elif self.coordinates or self.period or not self.order:
            raise ValueError("cyclic and sequential values are laid out by order")
        if len(set(self.order)) < len(self.order):
            raise ValueError("a value occurs twice in order")
        return self

    @property
    def labels(self) -> list[str]:
        return list(self.coordinates) if self.layout == "graph" else self.order

    def placed(self) -> Layout:
        count = len(self.labels)
        if self.layout == "graph":
            places = torch.tensor(list(self.coordinates.values()), dtype=torch.float64)
            return Layout("graph", places, torch.tensor(self.period or [0.0] * places.shape[1], dtype=torch.float64))
        period = torch.tensor([float(count) if self.layout == "cyclic" else 0.0], dtype=torch.float64)
        return Layout(self.layout, torch.arange(count, dtype=torch.float64).unsqueeze(1), period)


class ManifoldSteering(Recipe):
    name = "manifold"
    summary = "the curve or surface on which a concept's values lie, to move answers along"
    request = ManifoldRequest
    without_massive = True
    ops = ("manifold",)
    sites = (SITE,)
    scope = NEXT
    effect = "shuffled_labels_percentile"
    chance = {"shuffled_labels_percentile": "centroids of dealt labels",
              "shuffled_knots_percentile": "curves through dealt values"}

    def prepare(self, request: ManifoldRequest, subject: Subject) -> tuple[Labelled, Answers]:
        _check_layout(request.placed())
        site_layers(request, SITE, subject.facts)
        data = labelled(request.examples, subject, request.seed, complete=["train"])
        values, answers = _values(data, request.labels), _answers(request, subject)
        _check_order(request)
        _check_prompts(request, data, values, answers)
        return data, answers

    def passes(self, request: ManifoldRequest, data: tuple[Labelled, Answers], facts: ModelFacts) -> int:
        examples, answers = data
        read = sum(map(len, examples.texts))
        length, values = read / len(examples.texts), answers.count
        swaps = min(request.max_eval, len(examples.splits["test"])) * (values - 1)
        prompts = min(request.max_eval, len(examples.splits["test"]))
        # Dealt knots are walked from half of the prompts.
        walk, dealt = prompts * request.steps, (prompts + 1) // 2 * request.steps
        # On dev at most 6 points of at most 8 walks, which cost as much at every layer that goes on.
        layers = len(site_layers(request, SITE, facts))
        walked = MOST_WALKED * 8 * min(request.max_eval, len(examples.splits["dev"])) * min(request.steps, 6)
        return round(2 * read + length * (layers * swaps + walked + (2 * request.draws + 2) * swaps
                                          + (3 * walk + request.draws * dealt) * request.max_pairs))

    def make(self, request: ManifoldRequest, data: tuple[Labelled, Answers], work: Work) -> Made:
        labels, layout = request.labels, request.placed()
        layers = site_layers(request, SITE, work.facts)
        examples, answers = data
        values = _values(examples, labels)
        train, test = (list(examples.splits[split]) for split in ("train", "test"))
        natural = answers.distribution(answer_logprobs(work.subject, examples.texts, work.within(0.0, 0.1, "capture"),
                                                       tokens=answers.tokens))
        behaviour = Behaviour.fit(natural[train], values[train], layout)
        norms = dict.fromkeys(layers, 0.0)
        fits: dict[int, Fit] = {}
        reading: dict[int, float] = {}
        with Scratch(layers, len(examples.texts), work.facts.d_model) as store:
            for n, found in stream(work.subject, examples.texts, SITE, layers, [-1],
                                   work.within(0.1, 0.3, "capture"), without_massive=True):
                for layer in layers:
                    store.put(layer, n, found[layer][0])
                    norms[layer] += float(found[layer][0].norm()) / len(examples.texts)
            for layer in layers:
                made = _fitted(store.rows(layer, train), values[train], layout, request, layer)
                if made is not None:
                    fits[layer] = made
                    reading[layer] = _read(made, made.centroids, store.rows(layer, test), values[test])
            usable = [n for n, made in fits.items() if not request.check_order or _in_order(made, layout)]
            draft = None
            if not usable:
                if not fits:
                    raise FitFailed("no layer's activations could be fitted by a manifold", param="layers",
                                    fix="Give more examples, or other layers.")
                # Kept, so that what was tried can be looked at.
                usable = list(fits)
                draft = ("at no layer do the values lie in their order; more examples, or other layers, may do, and "
                         "check_order false takes a manifold as it is")

            def tried(layer: int, split: Literal["dev", "test"]) -> Trial:
                base = _spread(examples.splits[split], values, request.max_eval)
                return Trial(work, SITE, layer, fits[layer], answers, behaviour, [examples.texts[n] for n in base],
                             [int(values[n]) for n in base])

            span = work.within(0.3, 0.4, "fit")
            dev = {layer: dev_swaps(tried(layer, "dev"), span.part(n, len(usable))) for n, layer in enumerate(usable)}
            most = max(score["swap"] for score in dev.values())
            # Walks cost far more than swaps: only where swaps do as well as anywhere.
            good = sorted((n for n in usable if dev[n]["swap"] >= most - SWAP_MARGIN),
                          key=lambda n: (-dev[n]["swap"], n))[:MOST_WALKED]
            span = work.within(0.4, 0.5, "fit")
            for n, layer in enumerate(good):
                dev[layer] |= dev_walks(tried(layer, "dev"), request, layout, span.part(n, len(good)))
            layer = min(good, key=lambda n: dev[n]["energy"])
            rows = store.rows(layer, train)
        trial, best = tried(layer, "test"), fits[layer]
        moved, controls = swaps(trial, request, rows, values[train], work.within(0.5, 0.6, "control"))
        energy, walk, controls["shuffled_knots"] = walks(trial, request, layout, work.within(0.6, 1.0, "control"))
        report: dict[str, Any] = {
            "method": self.name, "site": SITE, "layout": request.layout, "labels": labels, "best_layer": layer,
            "rank": len(best.basis), "examples": examples.counts(),
            "layers": {str(n): {"order": made.natural, "order_p": rounded(made.order_p), "dev": dev.get(n),
                                "test_reading": rounded(reading[n])} for n, made in fits.items()},
            "natural_energy": rounded(float(trial.energies(natural[test].view(1, len(test), 1, -1)))),
            "test": moved | {"answered": rounded(float((behaviour.nearest_value(natural[test]) == values[test])
                                                       .double().mean()))},
            "energy": energy, "walk": walk, "controls": controls}
        holding = _holding(examples, values, answers)
        if request.layout != "graph" and holding > MOST_HOLDING:
            report["warnings"] = [f"{holding:.0%} of the prompts hold their own answer, so that what is read may be a "
                                  "word that stood there and not what the model works out"]
        return Made(
            kind="manifold", op="manifold", site=SITE, numbers={n: _numbers(fits[n]) for n in usable},
            options={"labels": labels}, default_layers=[layer], residual_norm=norms, report=report,
            sign_convention="target names a label or a place in their order; shift goes on from where the token is",
            dev=dev[layer], test={**report["test"], "energy": report["energy"]["far"]},
            card={"rank": len(best.basis), "layout": request.layout,
                  "shuffled_labels_percentile": report["controls"]["shuffled_labels"]["percentile"],
                  "shuffled_knots_percentile": report["controls"]["shuffled_knots"]["percentile"]},
            data={"data_hash": examples.digest, "num_examples": len(examples.texts)}, draft=draft)


def _values(data: Labelled, labels: Sequence[str]) -> torch.Tensor:
    """Number of each text's label.

    Raises:
        OneClass: labels and layout differ.
    """
    if set(data.labels) != set(labels):
        odd = sorted(set(data.labels) ^ set(labels))[0]
        raise OneClass(f"the value {odd[:80]!r} is in the layout or among the examples, and not in both",
                       param="examples", fix="Lay out every label, and give examples of each.")
    return torch.tensor([labels.index(label) for label in data.labels])


def _check_order(request: ManifoldRequest) -> None:
    """Raises TooFewExamples: so few values that no order of theirs can be told from luck."""
    if request.layout == "sequential" and request.check_order and 2 / factorial(len(request.order)) > ORDER_P:
        raise TooFewExamples(f"{len(request.order)} values lie in their order by luck more often than once in "
                             f"{1 / ORDER_P:.0f} times", param="order",
                             fix="Give five values or more, or check_order false.")


def _check_prompts(request: ManifoldRequest, data: Labelled, values: torch.Tensor, answers: Answers) -> None:
    """Raises AnswerInPrompt: a prompt ends with its answer. On a graph the last node is what a prompt is of."""
    if request.layout == "graph":
        return
    for n, text in enumerate(data.texts):
        if text[-1] in answers.spelled(int(values[n])):
            raise AnswerInPrompt(f"the prompt ends with its own answer, {data.labels[n]!r}",
                                 param=("examples", n, "text"),
                                 fix='End it where the model is to answer: "What comes after Monday? It is".')


def _holding(data: Labelled, values: torch.Tensor, answers: Answers) -> float:
    """Share of the prompts in which their own answer occurs."""
    return sum(bool(answers.spelled(int(value)) & set(text)) for text, value in zip(data.texts, values, strict=True)
               ) / len(data.texts)


def _answers(request: ManifoldRequest, subject: Subject) -> Answers:
    """Raises NoContrast: two values share a first token, or a value has no spelling of one token."""
    groups: list[list[int]] = []
    owner: dict[int, str] = {}
    for label in request.labels:
        if label in request.answers:
            tokens = [first_token(subject, text, ("answers", label)) for text in request.answers[label]]
        else:
            spelled = [subject.encode_continuation(text) for text in (f" {label}", label)]
            tokens = [ids[0] for ids in spelled if len(ids) == 1]
        if not tokens:
            raise NoContrast(f"the value {label!r} is no single token", param="answers",
                             fix="Give its spellings; their first tokens count.")
        for token in tokens:
            if owner.setdefault(token, label) != label:
                raise NoContrast(f"{label!r} and {owner[token]!r} begin with the same token", param="answers",
                                 fix="Give spellings whose first tokens differ.")
        groups.append(list(dict.fromkeys(tokens)))
    return Answers.make(groups)


def _check_layout(layout: Layout) -> None:
    """Raises InvalidRequest: coordinates through which no curve or surface can be laid."""
    try:
        Manifold.build(layout.coordinates, torch.zeros(len(layout.coordinates), 1), layout.period)
    except InvalidPayload as error:
        raise InvalidRequest(f"the values' layout makes no manifold: {error.message}",
                             param="coordinates" if layout.kind == "graph" else "order", fix=error.fix) from error


def _fitted(rows: torch.Tensor, values: torch.Tensor, layout: Layout, request: ManifoldRequest, layer: int
            ) -> Fit | None:
    """None where the activations make no manifold, as where two values have the same centroid."""
    try:
        return fit(rows, values, layout, request.rank, request.generator(layer))
    except InvalidPayload:
        return None


def _in_order(made: Fit, layout: Layout) -> bool:
    return made.natural if layout.kind == "cyclic" else made.order_p <= ORDER_P


def _read(made: Fit, centroids: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> float:
    """Share of activations whose nearest centroid is that of their value."""
    return float((torch.cdist(made.inside(rows), centroids).argmin(dim=1) == values).double().mean())


def _spread(members: Sequence[int], values: torch.Tensor, most: int) -> list[int]:
    """At most `most` texts, of as many values as there are."""
    seen: dict[int, int] = {}
    turn = {}
    for n in members:
        value = int(values[n])
        turn[n] = seen[value] = seen.get(value, 0) + 1
    return sorted(members, key=lambda n: (turn[n], n))[:most]


def _numbers(made: Fit) -> dict[str, torch.Tensor]:
    return {"basis": made.basis, "mean": made.mean, "knots": made.manifold.knots, "points": made.manifold.points,
            "period": made.manifold.period}


METHOD = ManifoldSteering()
