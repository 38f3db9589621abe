"""The diagonal tuned lens: per layer a scale and a shift of every dim that foresee the last layer (Nadaf 2026, arXiv
2604.02608).

T_l(h) = scale * h + shift, fitted to the last layer's activation of the same token, on the model's own text: prompts
and what it says after them. What the paper leaves open is decided here: texts are split 60/20/20; each text's first
token is left out, as many models use it as a sink; instead of AdamW with early stopping the minimum itself is taken,
which for a diagonal map under squared error is one regression a dim.

The report holds, per layer, the share of the last layer's variance that is explained on test by the map and by doing
nothing, the KL of the lens's next-token distribution from the model's, and how often both name the same token, for the
tuned and for the logit lens. Controls: maps fitted to the last layers of other tokens, and the map with its dims dealt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from vectors.extract.items import Splits, digest_of
from vectors.extract.programs import LAST, program_of
from vectors.extract.recipe import Made, Recipe, RecipeOptions, site_layers
from vectors.extract.refusals import FitFailed, TooFewExamples
from vectors.extract.standing import rounded, standing
from vectors.extract.subject import Prompt, Subject, Tokens, answer_logprobs, stream
from vectors.extract.unlabelled import continued, split_prompts
from vectors.extract.work import Span, Work

SITE: Site = "resid_post"


class TunedLensRequest(RecipeOptions):
    """Prompts from whose continuations the lens is fitted."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=100_000)] = Field(
        description="Texts, conversations or token ids, each about something else.")
    max_tokens: int = Field(default=24, ge=0, le=1024, description="Tokens the model says after each; 0: the prompts "
                            "are its text already.")
    max_eval: int = Field(default=32, ge=2, le=1000, description="Most test texts whose next token is compared.")


@dataclass
class Sums:
    """What a regression of y on x needs, per dim: count and sums `[width]`."""

    count: int
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor

    @classmethod
    def empty(cls, width: int) -> "Sums":
        return cls(0, *(torch.zeros(width, dtype=torch.float64) for _ in range(5)))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """`x`, `y`: `[n, width]`."""
        x, y = x.double(), y.double()
        self.count += len(x)
        for name, value in (("x", x), ("y", y), ("xx", x * x), ("xy", x * y), ("yy", y * y)):
            setattr(self, name, getattr(self, name) + value.sum(dim=0))

    def fit(self) -> dict[str, torch.Tensor]:
        """Least squares; a dim that does not vary keeps its scale and moves to the mean."""
        spread = self.xx - self.x * self.x / self.count
        live = spread > 1e-12 * self.xx.clamp_min(1e-30)
        scale = torch.where(live, (self.xy - self.x * self.y / self.count) / torch.where(live, spread, 1.0), 1.0)
        return {"scale": scale, "shift": (self.y - scale * self.x) / self.count}

    def explained(self, scale: torch.Tensor, shift: torch.Tensor) -> float:
        """Share of y's variance, over all dims, that scale * x + shift explains. May be negative."""
        error = (self.yy + scale**2 * self.xx + self.count * shift**2 - 2 * scale * self.xy - 2 * shift * self.y
                 + 2 * scale * shift * self.x).sum()
        total = (self.yy - self.y * self.y / self.count).sum()
        return float(1 - error / total)


class TunedLens(Recipe):
    name = "tuned_lens"
    summary = "scale and shift of every dim that foresee the last layer: a better logit lens"
    request = TunedLensRequest
    ops = ("affine",)
    sites = (SITE,)
    untried = "it is made to be read, as a lens"

    def prepare(self, request: TunedLensRequest, subject: Subject) -> tuple[list[Tokens], Splits]:
        self._layers(request, subject.facts)
        return split_prompts(subject, request.prompts, request.seed)

    def _layers(self, request: TunedLensRequest, facts: ModelFacts) -> list[int]:
        last = facts.num_layers - 1
        facts.check_site(SITE, last, "layers")
        layers = [layer for layer in site_layers(request, SITE, facts) if layer != last]
        if not layers:
            raise FitFailed("the last layer needs no lens, because its logits are the model's own", param="layers",
                            fix="Name an earlier one.")
        return layers

    def make(self, request: TunedLensRequest, data: tuple[list[Tokens], Splits], work: Work) -> Made:
        last = work.facts.num_layers - 1
        layers = self._layers(request, work.facts)
        prompts, splits = data
        texts = continued(work, prompts, request.max_tokens, work.within(0.0, 0.3, "capture"))
        width = work.facts.d_model
        train, dev, test, crossed = ({layer: Sums.empty(width) for layer in layers} for _ in range(4))
        sums_of = {"train": train, "dev": dev, "test": test}
        ends: dict[int, Mapping[int, torch.Tensor]] = {}
        member = {n: split for split, found in splits.items() for n in found}
        chosen = set(splits["test"][:request.max_eval])
        before: torch.Tensor | None = None
        span = work.within(0.3, 0.6, "capture")
        for n, found in stream(work.subject, texts, SITE, [*layers, last], None, span):
            final = found[last][1:]
            for layer in layers if len(final) else []:
                sums_of[member[n]][layer].add(found[layer][1:], final)
                if member[n] == "train" and before is not None:
                    # The control foresees another text's tokens.
                    size = min(len(before), len(final))
                    crossed[layer].add(found[layer][1:1 + size], before[:size])
            if len(final) and member[n] == "train":
                # Backwards: texts often begin alike, and the same token is no control.
                before = final.flip(0)
            if n in chosen:
                ends[n] = {layer: h[-1] for layer, h in found.items()}
        if not all(sums[layers[0]].count for sums in sums_of.values()):
            raise TooFewExamples("the texts of a split have no token but the first", param="prompts")
        maps = {layer: sums.fit() for layer, sums in train.items()}
        quality = _quality(request, work, texts, ends, maps, last)
        layer_reports: dict[str, dict[str, Any]] = {}
        for layer in layers:
            wrong = crossed[layer].fit()
            layer_reports[str(layer)] = {
                "explained": rounded(test[layer].explained(**maps[layer])),
                "explained_untuned": rounded(test[layer].explained(torch.ones(width), torch.zeros(width))),
                "explained_other_tokens": rounded(test[layer].explained(**wrong)), **quality[layer]}
        gains = [quality[layer]["logit_kl"] - quality[layer]["tuned_kl"] for layer in layers]
        middle = layers[len(layers) // 2]
        generator, dealt = request.generator(1), []
        for _ in range(request.draws):
            order = torch.randperm(width, generator=generator)
            dealt.append(test[middle].explained(**{name: values[order] for name, values in maps[middle].items()}))
        report = {"method": self.name, "site": SITE, "texts": {split: len(found) for split, found in splits.items()},
                  "tokens": {"train": train[middle].count, "test": test[middle].count}, "layers": layer_reports,
                  "mean_kl_gain": rounded(sum(gains) / len(gains)),
                  "controls": {"layer": middle, "dealt_dims": standing(test[middle].explained(**maps[middle]), dealt)}}
        return Made(
            kind="diagonal", op="affine", site=SITE, numbers=maps, report=report,
            sign_convention="scale * h + shift is the last layer's activation as this layer foresees it",
            dev={"explained": rounded(dev[middle].explained(**maps[middle]))},
            test={"explained": layer_reports[str(middle)]["explained"], "mean_kl_gain": report["mean_kl_gain"]},
            card={"explained_layer": middle,
                  "explained_other_tokens": layer_reports[str(middle)]["explained_other_tokens"]},
            data={"data_hash": digest_of([texts, {s: list(m) for s, m in splits.items()}]), "num_texts": len(texts)})


def _quality(request: TunedLensRequest, work: Work, texts: Sequence[Tokens], ends: Mapping[int, Any],
             maps: Mapping[int, Mapping[str, torch.Tensor]], last: int) -> dict[int, dict[str, float]]:
    """Per layer: KL(model || lens) in nats and agreement of the likeliest token, of both lenses, at the texts' ends."""
    order = sorted(ends)
    span = work.within(0.6, 1.0, "control")
    truth = answer_logprobs(work.subject, [texts[n] for n in order], span.part(0, len(maps) + 1))
    found: dict[int, dict[str, float]] = {}
    for done, (layer, numbers) in enumerate(maps.items()):
        part = span.part(done + 1, len(maps) + 1)
        found[layer] = {}
        for i, lens in enumerate(("logit", "tuned")):
            rows = []
            for k, n in enumerate(order):
                h = ends[n][layer].double()
                mapped = h if lens == "logit" else numbers["scale"] * h + numbers["shift"]
                rows.append(_spoken(work, texts[n], last, mapped, part.part(i, 2).part(k, len(order))))
            logprobs = torch.cat(rows)
            found[layer][f"{lens}_kl"] = rounded(float((truth.exp() * (truth - logprobs)).sum(dim=1).mean()))
            found[layer][f"{lens}_top1"] = rounded(float((truth.argmax(1) == logprobs.argmax(1)).double().mean()))
    return found


def _spoken(work: Work, text: Tokens, last: int, h: torch.Tensor, span: Span) -> torch.Tensor:
    """Log-probabilities `[1, vocab_size]` with `h` in the place of the last layer's activation of the last token."""
    placing = program_of(work.facts, "vector", "patch", SITE, {last: {"vector": h}}, scope=LAST)
    return answer_logprobs(work.subject, [text], span, placing)


METHOD = TunedLens()
