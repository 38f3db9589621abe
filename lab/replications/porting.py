"""Does a direction of one model do in another what it does at home, once it went through a map between the two?

Bundled directions of lab-dense are ported to a model that was trained on from its weights and to one that was trained
from another seed. All arms of a target have the same layer, length and prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from lab.corpus import documents
from lab.datasets import load
from lab.paths import LAB_DIR
from lab.replications.chart import OURS, PLAIN, SECOND, THIRD, spread, tidy
from lab.replications.common import DRAWS, Case, Document, Finding, Row, extracted, figures, pairs_of
from lab.replications.outcomes import Asked, answers, stored_program, surprise_of
from lab.replications.siblings import SIBLINGS, sibling
from steering.artifacts.payload import Payload
from vectors.artifact import Limits, Metadata
from vectors.evaluate.graders import Grader, LanguageGrader, SentimentGrader
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.standing import standing
from vectors.formats import get_format
from vectors.porting.aligned import METHODS, align
from vectors.porting.read import read_rows
from vectors.porting.run import HELD_OUT, Rows, near, port

TEXTS, PROMPTS, TOKENS = 300, 20, 18
# By bundled direction: the prompts, how answers are graded, what is wanted, and pairs that the target's own is made
# from.
TRIED: dict[str, tuple[str, Grader, str, str]] = {
    "cheerful": ("sentiment_neutral", SentimentGrader(), "positive", "sentiment"),
    "french": ("language_neutral", LanguageGrader(language="fr"), "wanted", "language_french"),
}

WORDS = {"cheerful": "positive", "french": "in French"}


def cases(model: LocalSubject) -> Iterator[Case]:
    """What is ported is bundled; this is made as the target's own directions are, on lab-dense."""
    yield Case("tone", "mean_difference", {"pairs": pairs_of("sentiment"), "trial": {"effort": "none"}})


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    tokens = read_texts(model)
    document: Document = {"home": {name: at_home(name, model) for name in TRIED}, "targets": {}}
    for kind in SIBLINGS:
        target = sibling(kind)
        document["targets"][kind] = {name: one(name, tokens, model, target) for name in TRIED}
    return document


def read_texts(model: LocalSubject) -> list[tuple[int, ...]]:
    stream = documents("porting")
    return [model.encode(next(stream).text)[:64] for _ in range(TEXTS)]


def bundled(name: str) -> tuple[Metadata, Payload]:
    data = (LAB_DIR / "artifacts" / "lab-dense" / f"{name}.safetensors").read_bytes()
    return get_format("safetensors").read(data, {}, Limits())


def at_home(name: str, model: LocalSubject) -> dict[str, Any]:
    prompts, grader, wanted, _ = TRIED[name]
    requests = asked(model, prompts)
    return {"untouched": share(model, requests, None, grader, wanted),
            "steered": share(model, requests, bundled(name), grader, wanted)}


def one(name: str, tokens: Sequence[tuple[int, ...]], model: LocalSubject, target: LocalSubject) -> dict[str, Any]:
    """Outcomes at the target, of all arms."""
    prompts, grader, wanted, pairs = TRIED[name]
    metadata, payload = bundled(name)
    assert isinstance(metadata.layers, list)
    [layer] = metadata.layers
    rows = rows_of(tokens, layer, model, target)
    requests = asked(target, prompts)
    ported = {method: port(name, metadata, payload, f"ported-{method}", rows, {layer: list(rows.target)}, method,
                           target.facts, "lab.replications") for method in ("auto", *METHODS)}
    chosen = ported["auto"]
    [at] = chosen.payload.layers
    length = float(chosen.payload.layers[at]["vector"].norm())

    def arm(vector: torch.Tensor) -> dict[str, float]:
        """A direction at the layer and with the length of what was ported."""
        made = Payload.build("vector", {at: {"vector": (vector * length / vector.norm()).float()}})
        return share(target, requests, (chosen.metadata, made), grader, wanted)

    generator = torch.Generator().manual_seed(0)
    own = extracted(target, Case(f"own-{name}", "mean_difference", {
        "pairs": pairs_of(pairs), "trial": {"effort": "none"}}), "lab.replications")
    vector = payload.layers[layer]["vector"]
    found = {"untouched": share(target, requests, None, grader, wanted), "copied": arm(vector),
             "own": arm(own.payload.layers[at]["vector"])}
    found |= {method: share(target, requests, (one.metadata, one.payload), grader, wanted)
              for method, one in ported.items()}
    turned = [arm(vector @ torch.linalg.qr(torch.randn(len(vector), len(vector), generator=generator))[0])
              for _ in range(DRAWS)]
    shuffled = [arm(through_shuffled(vector, rows, layer, at, chosen.report.layers[0].method, generator))
                for _ in range(DRAWS)]
    return {"layer": at, "report": chosen.report.model_dump(mode="json"), "shares": found,
            "alike": {"copied": cosine(vector, own.payload.layers[at]["vector"]),
                      **{method: cosine(one.payload.layers[next(iter(one.payload.layers))]["vector"],
                                        own.payload.layers[at]["vector"]) for method, one in ported.items()}},
            "random": {key: standing(found["auto"][key], [draw[key] for draw in turned]) for key in found["auto"]},
            "shuffled": {key: standing(found["auto"][key], [draw[key] for draw in shuffled]) for key in found["auto"]},
            "sample": said(target, requests, (chosen.metadata, chosen.payload), grader)}


def rows_of(tokens: Sequence[tuple[int, ...]], layer: int, model: LocalSubject, target: LocalSubject) -> Rows:
    number = torch.cat([torch.full((len(text),), n) for n, text in enumerate(tokens)])
    position = torch.cat([torch.arange(len(text)) for text in tokens])
    source = {layer: torch.cat([one[layer] for start in range(0, len(tokens), 50) for one in model.capture(
        tokens[start:start + 50], "resid_post", [layer], None)])}
    candidates = {layer: near(layer, model.facts.num_layers, target.facts)}
    return read_rows(tokens, source, number, position, "resid_post", candidates, target, lambda done, stage: None)


def through_shuffled(vector: torch.Tensor, rows: Rows, layer: int, at: int, method: Any, generator: torch.Generator
                     ) -> torch.Tensor:
    """The direction through a map from tokens that are dealt to other tokens."""
    kept = (rows.position > 0) & (rows.text % HELD_OUT != HELD_OUT - 1)
    source, target = rows.source[layer][kept], rows.target[at][kept]
    dealt = torch.randperm(len(source), generator=generator)
    return align(source[dealt], target, rows.text[kept], method).direction(vector).float()


def asked(model: LocalSubject, name: str) -> Asked:
    texts = tuple(dict.fromkeys(record["text"] for record in load(name, "test")))[:PROMPTS]
    tokens = tuple(model.encode(text) for text in texts)
    written = model.write(tokens, TOKENS)
    return Asked(texts, tokens, tuple(one.text for one in written),
                 median(surprise_of(model, tokens, [one.ids for one in written])))


def share(model: LocalSubject, requests: Asked, steered: tuple[Metadata, Payload] | None, grader: Grader, wanted: str
          ) -> dict[str, float]:
    program = None if steered is None else stored_program(model, *steered)
    found = answers(model, requests, program, grader, TOKENS)[0]
    return {"wanted": found[wanted], "broken": found["broken"]}


def said(model: LocalSubject, requests: Asked, steered: tuple[Metadata, Payload], grader: Grader
         ) -> list[dict[str, str]]:
    _, texts = answers(model, requests, stored_program(model, *steered), grader, TOKENS)
    return [{"prompt": prompt, "untouched": before, "ported": text, "outcome": outcome}
            for prompt, before, (text, outcome) in zip(requests.texts[:4], requests.untouched, texts, strict=False)]


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one.double() @ other.double() / one.double().norm() / other.double().norm())


def findings(document: Document) -> list[Finding]:
    found = []
    for kind, by_name in document["measured"]["targets"].items():
        for name, one in by_name.items():
            home, shares, layer = document["measured"]["home"][name], one["shares"], one["report"]["layers"][0]
            random, dealt = one["random"]["wanted"], one["shuffled"]["wanted"]
            ours = shares["auto"]
            beyond = ours["wanted"] > max(random["max"], dealt["max"], shares["untouched"]["wanted"])
            verdict = ("More than any random turn and any map from shuffled tokens." if beyond else
                       "No more than controls reach.")
            if shares["copied"]["wanted"] >= ours["wanted"]:
                verdict += " The numbers as they are do as much."
            found.append(Finding(
                f"whole answers to {PROMPTS} prompts that are {WORDS[name]}, `{name}` of lab-dense ported to its "
                f"{kind} ({layer['method']}, {layer['explained']:.2f} of the variance of texts held out, layer "
                f"{one['layer']})",
                f"{in_words(ours)}; untouched {in_words(shares['untouched'])}; " + "; ".join(
                    f"{method} {in_words(shares[method])}" for method in METHODS) +
                f"; at home {in_words(home['steered'])}, untouched there {in_words(home['untouched'])}",
                f"random turns {figures(random, '.2f')}; maps from shuffled tokens {figures(dealt, '.2f')}; the "
                f"numbers unported {in_words(shares['copied'])}; the target's own direction "
                f"{in_words(shares['own'])}", verdict))
    return found


def in_words(shares: Mapping[str, float]) -> str:
    return f"{shares['wanted']:.2f} (broken {shares['broken']:.2f})"


def draw(document: Document, figure: Figure) -> None:
    axes = figure.subplots()
    arms = [(f"{name}, {kind}", one) for kind, by_name in document["measured"]["targets"].items()
            for name, one in by_name.items()]
    at = list(range(len(arms)))
    spread(axes, [x - 0.1 for x in at], [one["random"]["wanted"] for _, one in arms], "random turns")
    spread(axes, [x + 0.1 for x in at], [one["shuffled"]["wanted"] for _, one in arms], "shuffled tokens")
    marks = (("auto", "o", OURS), ("own", "^", SECOND), ("copied", "x", THIRD), ("untouched", "_", PLAIN))
    for key, mark, colour in marks:
        axes.plot(at, [one["shares"][key]["wanted"] for _, one in arms], mark, color=colour, label=key)
    axes.set_xticks(at, [label for label, _ in arms], fontsize=8)
    axes.set_ylim(-0.05, 1.05)
    tidy(axes, title="share of whole answers as wanted, at the target")


ROW = Row(
    "porting", "Directions in another checkpoint", "lab-dense",
    "Models that learnt the same things hold them in spaces that a linear map, often a turn, brings onto each other; "
    "so directions can be carried over (relative representations, arXiv 2209.15430; steering vectors across models, "
    "arXiv 2503.04429).",
    cases, measure, findings, draw,
    judged="Whole answers by graders of sentiment and language, greedy, 18 tokens. Broken counts as broken.",
    notes="The fine-tune is 80 steps of training on other shares of the corpus, the second seed 320 steps from new "
    "weights; both share lab-dense's tokenizer and architecture. The map is fitted on 240 documents and "
    "judged on 60 others.")
