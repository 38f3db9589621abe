"""Do features of a sparse autoencoder steer better than random rows and than a mean difference?

Dictionaries are trained at a middle layer on texts of the train split. For each skill of the model one feature is
chosen on dev pairs: the one whose mean activation differs most between the two sides of a pair, or, by the gradient,
the one of which the difference raises the log-probability of the wanted texts most. It is added at every token, as the
mean difference of the same dev pairs is and random rows of about the same frequency are, each as strong as a KL of
`KL` nats on neutral dev texts asks for. What is graded are whole greedy answers to test prompts.

A third dictionary chooses its features in training by the model's gradient too (g-SAE, arXiv 2411.10397).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lab.datasets import load
from lab.replications.chart import CONTROL, OURS, SECOND, THIRD, spread, tidy
from lab.replications.common import DRAWS, Case, Document, Finding, Row, figures, mean, numbers, span
from steering.artifacts.dictionary import Dictionary
from steering.language.vocabulary import Site
from steering.models.taps import attach
from vectors.evaluate.graders import (
    BROKEN,
    Answer,
    Grader,
    LanguageGrader,
    RefusalGrader,
    SentimentGrader,
    Tools,
    grade,
)
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.dictionary.quality import loss_recovered, of_rows
from vectors.extract.dictionary.rows import ActivationRows
from vectors.extract.dictionary.training import Training
from vectors.extract.local import LocalSubject
from vectors.extract.programs import EVERYWHERE, adding
from vectors.extract.standing import rounded, standing
from vectors.extract.subject import Tokens, answer_logprobs

SITE: Site = "resid_post"
LAYER, FEATURES, K, STEPS, BATCH = 3, 512, 16, 1000, 256
TOPK, JUMP = "features-topk", "features-jumprelu"
RATE = 3e-3
KL, PROMPTS, WRITTEN, EACH, NEUTRAL = 0.15, 12, 16, 100, 12
# Shares of the loss that differ by less are taken for the same.
SAME = 0.005
SETS = ("sentiment", "languages", "relations", "calendar", "task_prompts", "refusal", "emotions", "tense", "neutral")


@dataclass(frozen=True)
class Skill:
    """pairs: data set whose positive side has it. prompts: data set and label of what is steered."""

    pairs: str
    prompts: str
    grader: Grader
    label: str | None = None
    side: str = "positive"


SKILLS: dict[str, Skill] = {
    "French": Skill("language_french", "language_neutral", LanguageGrader(language="fr")),
    "Spanish": Skill("language_spanish", "language_neutral", LanguageGrader(language="es")),
    "German": Skill("language_german", "language_neutral", LanguageGrader(language="de")),
    "positive": Skill("sentiment", "sentiment_neutral", SentimentGrader(wanted="positive")),
    "negative": Skill("sentiment", "sentiment_neutral", SentimentGrader(wanted="negative"), side="negative"),
    "refusal": Skill("refusal", "harmful_harmless", RefusalGrader(wanted="refusal"), "harmless"),
}
ARMS = ("TopK", "JumpReLU", "TopK, by gradient", "g-SAE", "mean difference")


def texts() -> list[str]:
    found: list[str] = []
    for name in SETS:
        records = load(name, "train")[:EACH]
        found += [record[key] for record in records for key in ("text", "positive", "negative") if key in record]
    return list(dict.fromkeys(found))


def cases(model: LocalSubject) -> Iterator[Case]:
    for name, activation in ((TOPK, "topk"), (JUMP, "jumprelu")):
        yield Case(name, "sae", {"texts": texts(), "layers": [LAYER], "activation": activation, "features": FEATURES,
                                 "k": K, "steps": STEPS, "batch": BATCH, "rate": RATE})


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    aware, told = by_gradient(model)
    held = {"TopK": numbers(found[TOPK], LAYER), "JumpReLU": numbers(found[JUMP], LAYER), "g-SAE": aware}
    return {"kl": KL, "layer": LAYER, "dictionaries": {"g-SAE": told},
            "skills": {name: of_skill(model, skill, held) for name, skill in SKILLS.items()}}


def by_gradient(model: LocalSubject) -> tuple[Mapping[str, Tensor], Document]:
    """A dictionary trained as the first one, on the same rows, with the model's gradient in the choice of features."""
    request = parse_request("sae", {"name": TOPK, **next(cases(model)).fields})
    data = prepare("sae", request, model, "lab.replications").data
    own = {split: [data.texts[n] for n in (members if split == "train" else members[:request.max_eval])]
           for split, members in data.splits.items()}
    plan = data.plan
    seen = {split: [felt(model, text) for text in some] for split, some in own.items()}
    count = sum(len(h) for h, _ in seen["train"])
    with ActivationRows(count, plan.width) as rows:
        for h, _ in seen["train"]:
            rows.add(h)
        gradients = torch.cat([gradient for _, gradient in seen["train"]])
        one = Training(plan, 0)
        for step in range(STEPS):
            index = rows.drawn(BATCH, 0, step)
            one.step(rows.batch(BATCH, 0, step), gradients[index])
        made = one.numbers(rows.mean, rows.scale)
        mean_of = rows.mean.float()
    dev, test = (torch.cat([h for h, _ in seen[split]]) for split in ("dev", "test"))
    told = of_rows(made, dev, test, torch.Generator().manual_seed(1))
    held_out = [text for text in own["test"] if len(text) > 1]
    loss = loss_recovered(span(model).work, SITE, LAYER, made, mean_of, held_out, span(model))
    return made, {**told, "loss": loss}


def felt(model: LocalSubject, text: Tokens) -> tuple[Tensor, Tensor]:
    """Activations behind the first token, `[T - 1, d]`, and the gradient there of the text's log-probability."""
    held: list[Tensor] = []

    def keep(h: Tensor) -> Tensor:
        held.append(h.detach().requires_grad_())
        return held[0]

    handle = attach(model.model, SITE, LAYER, keep)
    ids = torch.tensor([text])
    logprobs = model.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
    handle.remove()
    [gradient] = torch.autograd.grad(logprobs.gather(1, ids[0, 1:, None]).sum(), held)
    width = model.facts.d_model
    return held[0].detach().reshape(-1, width)[1:], gradient.reshape(-1, width)[1:]


def of_skill(model: LocalSubject, skill: Skill, held: Mapping[str, Mapping[str, Tensor]]) -> Document:
    sides = {side: [felt(model, model.encode(record[side])) for record in load(skill.pairs, "dev")]
             for side in ("positive", "negative")}
    wanted, other = sides[skill.side], sides["negative" if skill.side == "positive" else "positive"]
    h, rest = (torch.cat([one for one, _ in some]) for some in (wanted, other))
    pull = torch.cat([gradient for _, gradient in wanted]).mean(dim=0)
    values = {name: (Dictionary(one).features(h), Dictionary(one).features(rest)) for name, one in held.items()}
    gaps = {name: a.mean(dim=0) - b.mean(dim=0) for name, (a, b) in values.items()}
    decoder = held["TopK"]["decoder"]
    chosen = {name: int(gap.argmax()) for name, gap in gaps.items()}
    by_pull = int((gaps["TopK"].clamp_min(0) * (decoder @ pull)).argmax())
    rows = {name: held[name]["decoder"][index] for name, index in chosen.items()}
    vectors = {**rows, "TopK, by gradient": decoder[by_pull], "mean difference": h.mean(dim=0) - rest.mean(dim=0)}
    often = (torch.cat(values["TopK"]) > 0).float().mean(dim=0)
    near = (often - often[chosen["TopK"]]).abs().argsort().tolist()
    drawn = [n for n in near if n != chosen["TopK"]][:DRAWS]
    prompts = [record["text"] for record in load(skill.prompts, "test")
               if skill.label in (None, record.get("label"))][:PROMPTS]
    said = {arm: answered(model, prompts, skill.grader, vectors[arm]) for arm in ARMS}
    random = [answered(model, prompts, skill.grader, decoder[n]) for n in drawn]
    return {"features": {**chosen, "TopK, by gradient": by_pull}, "frequency": rounded(float(often[chosen["TopK"]])),
            "random_frequency": rounded(float(often[drawn].mean())), "prompts": len(prompts),
            "untouched": answered(model, prompts, skill.grader, None), "arms": said,
            "random": {key: standing(said["TopK"][key], [one[key] for one in random]) for key in ("success", "broken")}}


def answered(model: LocalSubject, prompts: Sequence[str], grader: Grader, vector: Tensor | None) -> Document:
    """Shares of greedy answers that are what is wanted, and that are broken."""
    program = None
    if vector is not None:
        unit = vector / vector.norm()
        size = strength(model, tuple(unit.tolist()))
        program = adding(model.facts, SITE, LAYER, size * unit, EVERYWHERE)
    tokens = [model.encode(prompt) for prompt in prompts]
    written = model.write(tokens, WRITTEN, program)
    surprise = surprises(model, tokens, [one.ids for one in written])
    usual = surprise if vector is None else untouched(model, tuple(prompts))
    answers = [Answer(one.text, prompt, one.ended) for one, prompt in zip(written, prompts, strict=True)]
    verdicts = grade(grader, answers, Tools(surprise=lambda some: surprise, usual_surprise=median(usual)))
    found = {"success": rounded(mean([float(one.success) for one in verdicts])),
             "broken": rounded(mean([float(one.outcome == BROKEN) for one in verdicts]))}
    return {**found, **({"strength": rounded(size)} if vector is not None else {}), "sample": written[0].text}


@cache
def untouched(model: LocalSubject, prompts: tuple[str, ...]) -> list[float]:
    tokens = [model.encode(prompt) for prompt in prompts]
    return surprises(model, tokens, [one.ids for one in model.write(tokens, WRITTEN)])


def surprises(model: LocalSubject, prompts: Sequence[Tokens], written: Sequence[Tokens]) -> list[float]:
    return [-value for value in model.continuation_logprobs(
        [(*prompt, *ids) for prompt, ids in zip(prompts, written, strict=True)], [len(prompt) for prompt in prompts])]


@cache
def strength(model: LocalSubject, unit: tuple[float, ...]) -> float:
    """The length at which a direction costs `KL` on neutral dev texts, within a few per cent."""
    direction = torch.tensor(unit)
    size, low, high = 4.0, 0.0, 1e3
    for _ in range(8):
        kl = neutral(model, size * direction)
        if abs(kl / KL - 1) < 0.05:
            break
        low, high = (size, high) if kl < KL else (low, size)
        # KL goes about with the square of the length.
        step = size * (KL / max(kl, 1e-6)) ** 0.5
        size = step if low < step < high else (low + high) / 2
    return size


def neutral(model: LocalSubject, vector: Tensor) -> float:
    some, base = plain(model)
    changed = answer_logprobs(model, some, lambda share: None, adding(model.facts, SITE, LAYER, vector, EVERYWHERE))
    return float((base.exp() * (base - changed)).sum(dim=1).mean())


@lru_cache(maxsize=1)
def plain(model: LocalSubject) -> tuple[list[Tokens], Tensor]:
    some = [model.encode(record["text"]) for record in load("neutral", "dev")[:NEUTRAL]]
    return some, answer_logprobs(model, some, lambda share: None)


def findings(document: Document) -> list[Finding]:
    measured, found = document["measured"], []
    told = {"TopK": document["cases"][TOPK], "JumpReLU": document["cases"][JUMP],
            "g-SAE": measured["dictionaries"]["g-SAE"]}
    for name in ("TopK", "JumpReLU"):
        one = told[name]
        steady = one["stability"]
        found.append(Finding(
            f"a {name} dictionary of {one['features']} features on test: variance explained, loss recovered of what "
            "ablating to the mean costs, active features, dead share",
            f"{one['explained']:.3f}, {one['loss']['recovered_of_mean']:.3f}, {one['l0']:.1f}, {one['dead']:.2f}",
            f"error {one['error_share']:.2f} of an activation's length, of which a linear map of the activation "
            f"foretells {one['predictable']:.2f} (errors dealt: {one['predictable_dealt']:.2f})",
            f"Two seeds: mean largest cosine {steady['found']:.2f}, dims dealt {steady['mean']:.2f}; "
            f"{steady['same']:.2f} of the features have one nearer than 0.7."))
    aware, blind = told["g-SAE"], told["TopK"]
    more = aware["loss"]["recovered_of_mean"] - blind["loss"]["recovered_of_mean"]
    found.append(Finding(
        "chosen by the gradient in training (g-SAE): variance explained, loss recovered, dead share",
        f"{aware['explained']:.3f}, {aware['loss']['recovered_of_mean']:.3f}, {aware['dead']:.2f}",
        f"by size alone {blind['explained']:.3f}, {blind['loss']['recovered_of_mean']:.3f}, {blind['dead']:.2f}",
        "As much of the loss is recovered; the paper claims more." if abs(more) < SAME else
        "More of the loss is recovered, as the paper claims." if more > 0 else
        "Less of the loss is recovered, against the paper's claim."))
    for skill, one in measured["skills"].items():
        arms, random = one["arms"], one["random"]["success"]
        plainly = arms["mean difference"]
        top = max(arms[arm]["success"] for arm in ARMS)
        best = " and ".join(arm for arm in ARMS if arms[arm]["success"] == top)
        beaten = arms["TopK"]["success"] > random["max"]
        say = (f"Most by {best}." if top > one["untouched"]["success"] else
               "No arm does more than the untouched model.")
        found.append(Finding(
            f"whole answers, {skill}, one feature added at a KL of {measured['kl']} nats, of {one['prompts']}",
            "; ".join(f"{arm} {arms[arm]['success']:.2f} (broken {arms[arm]['broken']:.2f})" for arm in ARMS[:-1])
            + f"; untouched {one['untouched']['success']:.2f}",
            f"mean difference {plainly['success']:.2f} (broken {plainly['broken']:.2f}); random rows as frequent "
            f"{figures(random, '.2f')}",
            f"{say} TopK's feature is {'above every random row.' if beaten else 'not above every random row.'}"))
    return found


def draw(document: Document, figure: Figure) -> None:
    axes = figure.subplots()
    skills = document["measured"]["skills"]
    width = 0.8 / len(ARMS)
    spread(axes, range(len(skills)), [one["random"]["success"] for one in skills.values()], "random rows")
    for n, (arm, colour) in enumerate(zip(ARMS, (OURS, SECOND, THIRD, "#8e5ea2", CONTROL), strict=True)):
        axes.bar([x + (n + 0.5) * width - 0.4 for x in range(len(skills))],
                 [one["arms"][arm]["success"] for one in skills.values()], width, label=arm, color=colour, alpha=0.8)
    axes.set_xticks(range(len(skills)), list(skills))
    tidy(axes, title="share of whole answers that are as wanted, all arms at the same KL")


ROW = Row(
    "sae-features", "Features of sparse autoencoders", "lab-dense",
    "Single features of a dictionary trained on activations steer a behaviour; features chosen by the model's gradient "
    "steer it more (g-SAE, arXiv 2411.10397), and a mean difference of labelled texts is a hard baseline (AxBench, "
    "arXiv 2501.17148).",
    cases, measure, findings, draw,
    judged="Whole greedy answers of 16 tokens to test prompts, graded; broken ones are no success. One feature a skill "
    "was chosen on dev pairs, where the mean difference was taken, too.",
    notes="The dictionaries are small and trained for a minute on some thousand short texts, so this says what such a "
    "dictionary is worth and no more.")
