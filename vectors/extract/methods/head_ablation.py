"""Heads that an answer depends on: ranked by what switching each off alone costs (Merullo et al. 2024, arXiv
2310.08744).

What the paper leaves open is decided here: the cost is the mean fall of the answer's first token's log-probability;
heads are ranked on train, the set is tried as a whole on dev and test, and on test against random other heads, of the
same layers as far as those have enough. Off is zero, the op's mode scale; where that is off the distribution, `scale`
softens it.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from steering.language.fields import Model
from steering.language.vocabulary import Site
from steering.programs.program import Program
from vectors.extract.answers import MOST_QUESTIONS, AnsweredOptions
from vectors.extract.contract import Split
from vectors.extract.contrasts import text_of
from vectors.extract.items import Item, Splits, digest_of, split_items
from vectors.extract.programs import EVERYWHERE, program_of
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import LeakingSplit, NoContrast
from vectors.extract.standing import rounded, standing
from vectors.extract.subject import Prompt, Subject, Tokens, answer_logprobs, encoded, first_token
from vectors.extract.trial.plan import Question
from vectors.extract.work import Span, Work

SITE: Site = "head_out"


class AnsweredPrompt(Model):
    """A prompt and what should follow."""

    text: Prompt = Field(description="Plain text, a conversation or token ids.")
    answer: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="What follows, with the space before it.")
    item: Item | None = Field(default=None, description="What it is about; prompts of one item share a split.")
    split: Split | None = Field(default=None, description="Fixed split; for all prompts or for none.")


class HeadAblationRequest(AnsweredOptions):
    """Prompts with their answers."""

    examples: Annotated[list[AnsweredPrompt], Field(min_length=1, max_length=100_000)]
    num_heads: int = Field(default=4, ge=1, le=4096, description="Heads to take.")
    scale: float = Field(default=0.0, ge=-10, le=10, description="Factor on the heads' outputs; 0 is off.")
    max_eval: int = Field(default=100, ge=5, le=10_000, description="Most prompts to rank by, and to test on.")


Answered = tuple[list[Tokens], list[int], list[str], Splits]
"""Prompts, first tokens of their answers, what they are about, splits."""


class HeadAblation(Recipe):
    name = "head_ablation"
    summary = "heads without which the answers are lost"
    request = HeadAblationRequest
    ops = ("head_mask",)
    sites = (SITE,)
    scope = EVERYWHERE
    effect = "random_percentile"

    def prepare(self, request: HeadAblationRequest, subject: Subject) -> Answered:
        site_layers(request, SITE, subject.facts)
        texts = [encoded(subject, example.text, ("examples", n, "text"))
                 for n, example in enumerate(request.examples)]
        answers = [first_token(subject, example.answer, ("examples", n, "answer"))
                   for n, example in enumerate(request.examples)]
        items = [example.item if example.item is not None else f"#{n}" for n, example in enumerate(request.examples)]
        _check(texts, answers, items)
        splits = split_items(items, [example.split for example in request.examples], request.seed, "examples")
        return texts, answers, items, splits

    def questions(self, request: HeadAblationRequest, data: Answered) -> list[Question]:
        """Held-out prompts with their answers."""
        texts, _, _, splits = data
        return [Question(texts[n], text_of(request.examples[n].text) or "", (request.examples[n].answer.strip(),))
                for n in splits["test"][:MOST_QUESTIONS]]

    def make(self, request: HeadAblationRequest, data: Answered, work: Work) -> Made:
        layers = site_layers(request, SITE, work.facts)
        texts, answers, items, splits = data
        fit, dev, test = (splits[split][:request.max_eval] for split in ("train", "dev", "test"))
        keys = [(layer, head) for layer in layers for head in range(work.facts.num_heads)]

        def without(heads: Sequence[tuple[int, int]]) -> Program:
            numbers = {layer: {"heads": torch.tensor(sorted(head for other, head in heads if other == layer))}
                       for layer in sorted({layer for layer, _ in heads})}
            return program_of(work.facts, "head_set", "head_mask", SITE, numbers, scope=EVERYWHERE,
                              options={"mode": "scale", "scale": request.scale})

        def logprob(members: Sequence[int], program: Program | None, span: Span) -> tuple[float, float]:
            right = torch.tensor([answers[n] for n in members])
            found = answer_logprobs(work.subject, [texts[n] for n in members], span, program)
            hit = (found.argmax(dim=1) == right).double().mean()
            return float(found.gather(1, right.unsqueeze(1)).mean()), float(hit)

        span = work.within(0.0, 0.7, "fit")
        before = logprob(fit, None, span.part(0, len(keys) + 1))[0]
        cost = {key: before - logprob(fit, without([key]), span.part(n + 1, len(keys) + 1))[0]
                for n, key in enumerate(keys)}
        chosen = sorted(keys, key=lambda key: (-cost[key], key))[:request.num_heads]

        span, generator = work.within(0.7, 1.0, "control"), request.generator(1)
        count = request.draws + 4
        dev_clean, dev_off = logprob(dev, None, span.part(0, count)), logprob(dev, without(chosen), span.part(1, count))
        clean, off = logprob(test, None, span.part(2, count)), logprob(test, without(chosen), span.part(3, count))
        random = [logprob(test, without(_like(chosen, keys, generator)), span.part(n + 4, count))
                  for n in range(request.draws)]
        control = {"logprob_drop": standing(clean[0] - off[0], [clean[0] - draw[0] for draw in random]),
                   "accuracy_drop": standing(clean[1] - off[1], [clean[1] - draw[1] for draw in random])}
        report: dict[str, Any] = {
            "method": self.name, "site": SITE, "examples": {split: len(members) for split, members in splits.items()},
            "heads": [{"layer": layer, "head": head, "cost": rounded(cost[layer, head])} for layer, head in chosen],
            "dev": _effect(dev_clean, dev_off), "test": _effect(clean, off),
            "controls": {"random_heads": control}}
        numbers = {layer: {"heads": torch.tensor(sorted(head for other, head in chosen if other == layer))}
                   for layer in sorted({layer for layer, _ in chosen})}
        return Made(kind="head_set", op="head_mask", site=SITE, numbers=numbers,
                    options={"mode": "scale", "scale": request.scale},
                    sign_convention="switching these heads off takes the answers away", report=report,
                    dev=report["dev"], test=report["test"],
                    card={"heads": len(chosen), "random_percentile": control["logprob_drop"]["percentile"]},
                    data={"data_hash": digest_of([texts, answers, items, {s: list(m) for s, m in splits.items()}]),
                          "num_examples": len(texts)})


def _effect(clean: tuple[float, float], off: tuple[float, float]) -> dict[str, float]:
    return {"accuracy": rounded(clean[1]), "accuracy_without": rounded(off[1]),
            "logprob": rounded(clean[0]), "logprob_without": rounded(off[0])}


def _like(chosen: Sequence[tuple[int, int]], keys: Sequence[tuple[int, int]], generator: torch.Generator
          ) -> list[tuple[int, int]]:
    """As many random heads, none of them chosen: of the same layers as far as those have others, else of any."""
    free = [keys[i] for i in torch.randperm(len(keys), generator=generator).tolist() if keys[i] not in set(chosen)]
    drawn: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in chosen}):
        count = sum(other == layer for other, _ in chosen)
        drawn += [key for key in free if key[0] == layer][:count]
    rest = [key for key in free if key not in drawn]
    return [*drawn, *rest][:len(chosen)]


def _check(texts: Sequence[tuple[int, ...]], answers: Sequence[int], items: Sequence[str]) -> None:
    seen: dict[tuple[int, ...], int] = {}
    for n, text in enumerate(texts):
        first = seen.setdefault(text, n)
        if items[first] != items[n]:
            raise LeakingSplit(f"the text repeats examples[{first}], under another item", param=("examples", n),
                               fix="Leave it out, or give both the same item.")
    if len(set(answers)) < 2:
        raise NoContrast("every answer begins with the same token: any head would do that keeps saying it",
                         param="examples", fix="Give prompts whose answers differ.")


METHOD = HeadAblation()
