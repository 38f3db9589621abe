"""What normal text is like inside the model, so that monitors can tell what is not (see `steering.artifacts.normality`
for the scores and their sources).

Texts are split 60/20/20. Means, variances, principal directions and patterns are those of train's tokens. Windows are
described, and thresholds set, on dev, because they must hold for text that was not fitted. A threshold is passed by
`false_alarms` of dev's tokens; the report tells what share of test's tokens passes it. The first token of each text is
left out, because many models use it as a sink.

Controls: the same texts with their tokens dealt anew, and tokens drawn from the texts' vocabulary. An artifact that
does not tell them from test texts by any form is a draft.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from steering.artifacts.normality import (
    MAX_WINDOW,
    MIN_WINDOW,
    NORMAL_FORMS,
    WINDOWED,
    bits,
    diffusion_entropy,
    normal_scores,
    over_windows,
    squared_distances,
    standardised,
    statistics,
)
from steering.language.gates import Reading
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops.base import VECTOR_SITES
from steering.programs.layers import explicit_layers
from vectors.extract.items import Splits, digest_of, split_items
from vectors.extract.recipe import Made, Recipe, RecipeOptions
from vectors.extract.refusals import LeakingSplit, TooFewExamples
from vectors.extract.standing import auc, auc_error, rounded
from vectors.extract.subject import Prompt, Subject, Tokens, batches, encoded, stream
from vectors.extract.work import Work

MOST_LAYERS = 8
MOST_BITS, MOST_PATTERNS = 24, 512
# Fewer tokens than this per direction do not tell what lies outside of them.
TOKENS_PER_DIRECTION = 4
MOST_DIRECTIONS = 64
# Standard errors by which an AUC must be over one half, because the best of many is looked for.
ERRORS = 3
# Share of normal texts whose mean may pass the threshold of a gate.
TEXT_ALARMS = 0.01


class NormalityRequest(RecipeOptions):
    """Texts that are normal."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=100_000)] = Field(
        description="Texts, conversations or token ids, each about something else, of the kind that is served.")
    max_tokens: int = Field(default=32, ge=0, le=1024, description="Tokens that the model says after each; 0: the "
                            "prompts are whole texts.")
    site: Site = Field(default="resid_post", description="Where activations are read.")
    window: int = Field(default=16, ge=MIN_WINDOW, le=MAX_WINDOW, description="Tokens that spectral and diffusion look "
                        "at together.")
    false_alarms: float = Field(default=0.001, ge=1e-5, le=0.2, description="Share of normal tokens that may pass the "
                                "thresholds which the artifact records.")
    max_eval: int = Field(default=400, ge=10, le=10_000, description="Most dev texts, and most test texts, that are "
                          "read.")


@dataclass
class Moments:
    """Count, sum `[d]` and sum of products `[d, d]` of the tokens of a layer."""

    count: int
    total: torch.Tensor
    products: torch.Tensor

    @classmethod
    def empty(cls, width: int) -> "Moments":
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def add(self, h: torch.Tensor) -> None:
        """`h [n, d]`"""
        h = h.double()
        self.count += len(h)
        self.total += h.sum(dim=0)
        self.products += h.T @ h

    def fit(self) -> dict[str, torch.Tensor]:
        """mean, scale, basis, variance and rest of a normality artifact."""
        mean = self.total / self.count
        covariance = self.products / self.count - mean[:, None] * mean[None, :]
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        # A dim that does not vary would make any step along it infinitely far.
        scale = deviation.clamp_min(1e-3 * float(deviation.mean()) + 1e-12)
        spectrum, vectors = torch.linalg.eigh(covariance / (scale[:, None] * scale[None, :]))
        width = len(mean)
        rank = max(1, min(MOST_DIRECTIONS, width // 2, self.count // TOKENS_PER_DIRECTION))
        floor = 1e-6 * float(spectrum.clamp_min(0).mean())
        variance = spectrum.flip(0)[:rank].clamp_min(floor)
        rest = spectrum.flip(0)[rank:].clamp_min(0).mean().clamp_min(floor)
        positive = spectrum.clamp_min(0)
        return {"mean": mean, "scale": scale, "basis": vectors.flip(1)[:, :rank].T.contiguous(), "variance": variance,
                "rest": rest, "dimension": positive.sum()**2 / positive.square().sum()}


class Normality(Recipe):
    name = "normality"
    summary = "what normal text is like inside the model, for monitors that tell what is not"
    request = NormalityRequest
    ops = ()
    sites = VECTOR_SITES
    untried = "it is made to be read, by monitors and gates"

    def prepare(self, request: NormalityRequest, subject: Subject) -> tuple[list[Tokens], Splits]:
        _layers(request, subject.facts)
        texts = [encoded(subject, prompt, ("prompts", n)) for n, prompt in enumerate(request.prompts)]
        seen: dict[Tokens, int] = {}
        for n, text in enumerate(texts):
            if seen.setdefault(text, n) != n:
                raise LeakingSplit(f"the prompt is the same as prompts[{seen[text]}]", param=("prompts", n),
                                   fix="Leave it out.")
        shortest = min(len(text) for text in texts) + request.max_tokens
        if shortest <= request.window:
            raise TooFewExamples(f"a text has at most {shortest} tokens, and a window of {request.window} behind the "
                                 "first one must be full", param="window",
                                 fix="Give longer texts, a larger max_tokens or a smaller window.")
        return texts, split_items([f"#{n}" for n in range(len(texts))], [None] * len(texts), request.seed, "prompts")

    def passes(self, request: NormalityRequest, data: tuple[list[Tokens], Splits], facts: ModelFacts) -> int:
        texts, splits = data
        long = sum(map(len, texts)) + len(texts) * request.max_tokens
        return long + len(texts) * request.max_tokens + 2 * long * len(splits["test"]) // len(texts)

    def make(self, request: NormalityRequest, data: tuple[list[Tokens], Splits], work: Work) -> Made:
        layers = _layers(request, work.facts)
        prompts, splits = data
        texts = _continued(request, work, prompts)
        chosen = {split: list(splits[split])[:None if split == "train" else request.max_eval] for split in splits}
        numbers = _fitted(request, work, [texts[n] for n in chosen["train"]], layers)
        of_texts = _described(request, work, [texts[n] for n in chosen["dev"]], numbers)
        held_out = [texts[n] for n in chosen["test"]]
        generator = request.generator(1)
        others = {"dealt": [_dealt(text, generator) for text in held_out],
                  "random": _random(held_out, generator)}
        normal = _scored(request, work, held_out, numbers, (0.7, 0.8))
        scored = {name: _scored(request, work, other, numbers, (0.8 + 0.1 * n, 0.9 + 0.1 * n))
                  for n, (name, other) in enumerate(others.items())}
        report = _report(request, numbers, normal, scored, {split: len(found) for split, found in chosen.items()})
        tells = any(found["auc"] - ERRORS * found["auc_error"] > 0.5 for layer in report["layers"].values()
                    for form in layer.values() for found in (form["dealt"], form["random"]))
        middle = layers[len(layers) // 2]
        shown = report["layers"][str(middle)]["mahalanobis"]
        return Made(
            kind="normality", op=None, site=request.site, numbers=numbers, report=report, default_layers=[middle],
            sign_convention="the higher a score, the less a token is like normal text",
            dev={"threshold": shown["threshold"]},
            test={"false_alarms": shown["false_alarms"], "random_auc": shown["random"]["auc"],
                  "dealt_auc": shown["dealt"]["auc"]},
            card={"forms": report["layers"][str(middle)], "chosen_layer": middle},
            data={"data_hash": digest_of([texts, {s: list(m) for s, m in splits.items()}]), "num_texts": len(texts)},
            reading=Reading(form="mahalanobis", pool="mean", threshold=of_texts[middle], direction="above"),
            draft=None if tells else "no form tells test texts from their own tokens in another order, or from "
            "random tokens")


def _layers(request: NormalityRequest, facts: ModelFacts) -> list[int]:
    """Those asked for; of "all" the ones at a quarter, half and three quarters of the depth."""
    if request.layers == "all":
        offered = sorted(facts.sites.get(request.site, ()))
        if not offered:
            facts.check_site(request.site, 0, "site")
        return sorted({offered[int(len(offered) * share)] for share in (0.25, 0.5, 0.75)})
    layers = sorted(explicit_layers(request.layers, facts))
    for layer in layers:
        facts.check_site(request.site, layer, "layers")
    if len(layers) > MOST_LAYERS:
        raise TooFewExamples(f"{len(layers)} layers are asked for, {MOST_LAYERS} are the most", param="layers",
                             fix="Name fewer.")
    return layers


def _continued(request: NormalityRequest, work: Work, prompts: Sequence[Tokens]) -> list[Tokens]:
    """The prompts with what the model says after them, within its context."""
    if not request.max_tokens:
        return list(prompts)
    span, found = work.within(0.0, 0.4, "capture"), []
    for batch in batches(prompts):
        span(batch.start / len(prompts))
        said = work.subject.generate([prompts[n] for n in batch], request.max_tokens)
        for n, text in zip(batch, said, strict=True):
            whole = (*prompts[n], *work.subject.encode_continuation(text))
            found.append(whole[:work.facts.context_length])
    return found


def _fitted(request: NormalityRequest, work: Work, texts: Sequence[Tokens], layers: Sequence[int]
            ) -> dict[int, dict[str, torch.Tensor]]:
    moments = {layer: Moments.empty(work.facts.width(request.site)) for layer in layers}
    # A pattern needs the directions, so some tokens are kept until they are known.
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    each = max(1, math.ceil(4 * MOST_PATTERNS / len(texts)))
    for _, found in stream(work.subject, texts, request.site, layers, None, work.within(0.4, 0.6, "capture")):
        for layer, h in found.items():
            if len(h) > 1:
                moments[layer].add(h[1:])
                kept[layer].append(h[1:][torch.linspace(0, len(h) - 2, min(each, len(h) - 1)).long()])
    if not moments[layers[0]].count:
        raise TooFewExamples("the texts have no token but the first", param="prompts")
    numbers = {}
    for layer in layers:
        fitted = {name: tensor.float() for name, tensor in moments[layer].fit().items()}
        count = min(MOST_BITS, len(fitted["basis"]))
        shown = bits(standardised(torch.cat(kept[layer]), fitted), fitted["basis"], count)
        distinct, often = torch.unique(shown, dim=0, return_counts=True)
        most = often.argsort(descending=True, stable=True)[:MOST_PATTERNS]
        numbers[layer] = {**fitted, "patterns": distinct[most], "window": torch.tensor(request.window)}
    return numbers


def _described(request: NormalityRequest, work: Work, texts: Sequence[Tokens],
               numbers: dict[int, dict[str, torch.Tensor]]) -> dict[int, float]:
    """Add what windows of dev texts are like, and the thresholds of tokens. Per layer the threshold of the mean of a
    text, in the form mahalanobis."""
    of_texts: dict[int, float] = {}
    layers, window = list(numbers), request.window
    zs: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for _, found in stream(work.subject, texts, request.site, layers, None, work.within(0.6, 0.7, "capture")):
        for layer, h in found.items():
            zs[layer].append(h)
    for layer, held in numbers.items():
        spreads: list[torch.Tensor] = []
        told: list[torch.Tensor] = []
        rows = [standardised(h, held) for h in zs[layer]]
        dimension = float(held["dimension"])

        def look(gram: torch.Tensor, told: list[torch.Tensor] = told, spreads: list[torch.Tensor] = spreads,
                 dimension: float = dimension) -> torch.Tensor:
            told.append(statistics(gram, work.facts.width(request.site), dimension))
            spreads.append(squared_distances(gram).flatten(1).median(dim=1).values)
            return gram.new_zeros(len(gram))

        for z in rows:
            over_windows(z, window, look)
        if sum(map(len, told)) < 4 * window:
            raise TooFewExamples(f"dev texts have {sum(map(len, told))} full windows, {4 * window} are the least",
                                 param="prompts", fix="Give more or longer texts, or a smaller window.")
        every = torch.cat(told).double()
        held["spectral_mean"] = every.mean(dim=0).float()
        held["spectral_whiten"] = _whitening(every - every.mean(dim=0)).float()
        bandwidth = float(torch.cat(spreads).median().clamp_min(1e-9).sqrt())
        held["bandwidth"] = torch.tensor(bandwidth)
        entropies: list[torch.Tensor] = []

        def measure(gram: torch.Tensor, entropies: list[torch.Tensor] = entropies, bandwidth: float = bandwidth
                    ) -> torch.Tensor:
            entropies.append(diffusion_entropy(gram, bandwidth))
            return gram.new_zeros(len(gram))

        for z in rows:
            over_windows(z, window, measure)
        entropy = torch.cat(entropies)
        held["diffusion"] = torch.stack([entropy.mean(), entropy.std().clamp_min(1e-4)])
        scores = {form: [_told(form, h, held) for h in zs[layer]] for form in NORMAL_FORMS}
        held["thresholds"] = torch.stack([_quantile(torch.cat(scores[form]), request.false_alarms)
                                          for form in NORMAL_FORMS])
        of_texts[layer] = rounded(float(_quantile(_means(scores["mahalanobis"]), TEXT_ALARMS)))
    return of_texts


def _whitening(rows: torch.Tensor) -> torch.Tensor:
    """`[q, q]`: rows times its transpose have variance 1 in all directions."""
    covariance = rows.T @ rows / len(rows)
    spectrum, vectors = torch.linalg.eigh(covariance)
    scales = spectrum.clamp_min(1e-6 * float(spectrum.max()) + 1e-12).rsqrt()
    whitening: torch.Tensor = vectors * scales @ vectors.T
    return whitening


def _told(form: Any, h: torch.Tensor, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The scores of a text's tokens that have one, without the first token."""
    scores = normal_scores(form, h, held)
    return scores[max(1, int(held["window"]) if form in WINDOWED else 1):]


def _quantile(scores: torch.Tensor, share: float) -> torch.Tensor:
    """What that share of the scores is above of."""
    ordered = scores.double().sort().values
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * (1 - share)))].float()


def _dealt(text: Tokens, generator: torch.Generator) -> Tokens:
    """The text with its tokens in another order; the first stays."""
    order = torch.randperm(len(text) - 1, generator=generator).tolist()
    return (text[0], *(text[1 + n] for n in order))


def _random(texts: Sequence[Tokens], generator: torch.Generator) -> list[Tokens]:
    """Texts of the same lengths, of tokens that any of them has, all as likely."""
    known = sorted({token for text in texts for token in text[1:]})
    return [(text[0], *(known[n] for n in torch.randint(len(known), (len(text) - 1,), generator=generator).tolist()))
            for text in texts]


def _scored(request: NormalityRequest, work: Work, texts: Sequence[Tokens],
            numbers: Mapping[int, Mapping[str, torch.Tensor]], part: tuple[float, float]
            ) -> dict[int, dict[str, list[torch.Tensor]]]:
    """Per layer and form the scores of each text's tokens."""
    found: dict[int, dict[str, list[torch.Tensor]]] = {layer: {form: [] for form in NORMAL_FORMS} for layer in numbers}
    for _, captured in stream(work.subject, texts, request.site, list(numbers), None, work.within(*part, "control")):
        for layer, h in captured.items():
            for form in NORMAL_FORMS:
                found[layer][form].append(_told(form, h, numbers[layer]))
    return found


def _means(texts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([scores.mean() for scores in texts if len(scores)])


def _report(request: NormalityRequest, numbers: Mapping[int, Mapping[str, torch.Tensor]],
            normal: Mapping[int, Mapping[str, list[torch.Tensor]]],
            others: Mapping[str, Mapping[int, Mapping[str, list[torch.Tensor]]]], texts: Mapping[str, int]
            ) -> dict[str, Any]:
    """auc: of the means of whole texts. false_alarms: share of test tokens over the threshold, with how many those
    were. found: share of tokens of the other texts over it."""
    layers: dict[str, dict[str, Any]] = {}
    for layer, held in numbers.items():
        layers[str(layer)] = {}
        for n, form in enumerate(NORMAL_FORMS):
            threshold = float(held["thresholds"][n])
            tokens, means = torch.cat(normal[layer][form]), _means(normal[layer][form])
            told: dict[str, Any] = {
                "threshold": rounded(threshold), "tokens": len(tokens),
                "false_alarms": rounded(float((tokens > threshold).double().mean()))}
            for name, scored in others.items():
                found, others_means = torch.cat(scored[layer][form]), _means(scored[layer][form])
                told[name] = {"auc": rounded(auc(others_means, means)),
                              "auc_error": rounded(auc_error(others_means, means)),
                              "found": rounded(float((found > threshold).double().mean()))}
            layers[str(layer)][form] = told
    return {"method": "normality", "site": request.site, "window": request.window, "texts": dict(texts),
            "asked_false_alarms": request.false_alarms, "layers": layers}


METHOD = Normality()
