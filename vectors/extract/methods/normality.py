"""What normal text is like inside the model, so that monitors can tell what is not (see `steering.artifacts.normality`
for the scores and their sources).

Texts are split 60/20/20. Means, variances, principal directions and patterns are those of train's tokens. Windows are
described, and thresholds set, on dev, because they must hold for text that was not fitted. A threshold is passed by
`false_alarms` of dev's tokens; the report tells what share of test's tokens passes it. The first token of each text is
left out, because many models use it as a sink.

Controls: the same texts with their tokens dealt anew, and tokens drawn from the texts' vocabulary. An artifact that
does not tell them from test texts by any form is a draft.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from steering.artifacts.normality import MAX_WINDOW, MIN_WINDOW, NORMAL_FORMS
from steering.language.gates import Reading
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops.base import VECTOR_SITES
from steering.programs.layers import explicit_layers
from vectors.extract.items import Splits, digest_of
from vectors.extract.normality_fit import describe, fitted, means, told_of
from vectors.extract.recipe import Made, Recipe, RecipeOptions
from vectors.extract.refusals import TooFewExamples
from vectors.extract.standing import auc, auc_error, rounded
from vectors.extract.subject import Prompt, Subject, Tokens, stream
from vectors.extract.unlabelled import continued, split_prompts
from vectors.extract.work import Work

MOST_LAYERS = 8
# Standard errors by which an AUC must be over one half, because the best of many is looked for.
ERRORS = 3


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


class Normality(Recipe):
    name = "normality"
    summary = "what normal text is like inside the model, for monitors that tell what is not"
    request = NormalityRequest
    ops = ()
    sites = VECTOR_SITES
    untried = "it is made to be read, by monitors and gates"

    def prepare(self, request: NormalityRequest, subject: Subject) -> tuple[list[Tokens], Splits]:
        _layers(request, subject.facts)
        texts, splits = split_prompts(subject, request.prompts, request.seed)
        shortest = min(len(text) for text in texts) + request.max_tokens
        if shortest <= request.window:
            raise TooFewExamples(f"a text has at most {shortest} tokens, and a window of {request.window} behind the "
                                 "first one must be full", param="window",
                                 fix="Give longer texts, a larger max_tokens or a smaller window.")
        return texts, splits

    def passes(self, request: NormalityRequest, data: tuple[list[Tokens], Splits], facts: ModelFacts) -> int:
        texts, splits = data
        long = sum(map(len, texts)) + len(texts) * request.max_tokens
        return long + len(texts) * request.max_tokens + 2 * long * len(splits["test"]) // len(texts)

    def make(self, request: NormalityRequest, data: tuple[list[Tokens], Splits], work: Work) -> Made:
        layers = _layers(request, work.facts)
        prompts, splits = data
        texts = continued(work, prompts, request.max_tokens, work.within(0.0, 0.4, "capture"))
        chosen = {split: list(splits[split])[:None if split == "train" else request.max_eval] for split in splits}
        train, dev = ([texts[n] for n in chosen[split]] for split in ("train", "dev"))
        numbers = fitted(stream(work.subject, train, request.site, layers, None, work.within(0.4, 0.6, "capture")),
                         len(train), layers, work.facts.width(request.site), request.window)
        of_texts = describe(stream(work.subject, dev, request.site, layers, None, work.within(0.6, 0.7, "capture")),
                            numbers, request.window, request.false_alarms)
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
                found[layer][form].append(told_of(form, h, numbers[layer]))
    return found


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
            tokens, own = torch.cat(normal[layer][form]), means(normal[layer][form])
            told: dict[str, Any] = {
                "threshold": rounded(threshold), "tokens": len(tokens),
                "false_alarms": rounded(float((tokens > threshold).double().mean()))}
            for name, scored in others.items():
                found, theirs = torch.cat(scored[layer][form]), means(scored[layer][form])
                told[name] = {"auc": rounded(auc(theirs, own)),
                              "auc_error": rounded(auc_error(theirs, own)),
                              "found": rounded(float((found > threshold).double().mean()))}
            layers[str(layer)][form] = told
    return {"method": "normality", "site": request.site, "window": request.window, "texts": dict(texts),
            "asked_false_alarms": request.false_alarms, "layers": layers}


METHOD = Normality()
