"""Angular steering: a plane in which to turn the activation between having a behaviour and not (arXiv 2510.26243).

First axis: the unit difference of means at one layer. Second axis: the first principal component of the differences of
all candidate layers, made perpendicular to the first. 0 degrees is along the behaviour, 180 opposite to it. The source
layer is chosen on dev by the spread of the behaviour's log-odds over a sweep of angles, and so are the angles of most
and of least log-odds; test is read once.

What the paper leaves open is decided here: the plane acts on the residual stream itself (resid_post) at every layer
from the source on, not on the inputs of norm modules; all tokens; the sweep is a setting. With one layer, or
differences that all point one way, the second axis is the first component of the pair differences at the source.
Controls: random planes, and planes from differences of dealt labels, each with the best two angles of its own on dev.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from steering.language.vocabulary import Site
from steering.programs.program import Program
from vectors.extract.answers import AnsweredOptions
from vectors.extract.data import Dataset
from vectors.extract.methods.refusal_direction import kl
from vectors.extract.programs import EVERYWHERE, program_of
from vectors.extract.readout import Readout, ReadoutOptions, make_readout
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import FitFailed
from vectors.extract.scratch import Scratch
from vectors.extract.standing import rounded, standing
from vectors.extract.subject import Subject, Tokens, stream
from vectors.extract.text_pairs import TextPairs, paired
from vectors.extract.work import Span, Work

SITE: Site = "resid_post"
Angles = Annotated[list[Annotated[float, Field(ge=-360, le=360)]], Field(min_length=2, max_length=72)]


class AngularSteeringRequest(AnsweredOptions):
    """Prompts that bring a behaviour about (positive) and prompts that do not."""

    pairs: TextPairs
    readout: ReadoutOptions = Field(description="Answers that are the behaviour.")
    angles: Angles = Field(default=[0.0, 45.0, 90.0, 135.0, 180.0, 225.0, 270.0, 315.0],
                           description="Angles tried, in degrees from the behaviour's direction.")
    adaptive: bool = Field(default=False, description="Turn only tokens that point along the behaviour.")
    max_eval: int = Field(default=16, ge=2, le=1000, description="Most pairs of dev and of test to score.")


class AngularSteering(Recipe):
    name = "angular_steering"
    summary = "plane in which turning the activation brings a behaviour about or takes it away"
    request = AngularSteeringRequest
    without_massive = True
    ops = ("rotate",)
    sites = (SITE,)
    scope = EVERYWHERE
    effect = "random_percentile"

    def prepare(self, request: AngularSteeringRequest, subject: Subject) -> tuple[Dataset, Readout]:
        site_layers(request, SITE, subject.facts)
        return paired(request.pairs, subject, request.seed), make_readout(request.readout, subject)

    def make(self, request: AngularSteeringRequest, data: tuple[Dataset, Readout], work: Work) -> Made:
        layers = site_layers(request, SITE, work.facts)
        pairs, readout = data
        texts = [text for pair in pairs.pairs for text in (pair.positive, pair.negative)]
        train = pairs.splits["train"]
        norms = dict.fromkeys(layers, 0.0)
        with Scratch(layers, len(texts), work.facts.d_model) as store:
            for n, found in stream(work.subject, texts, SITE, layers, [-1],
                                   work.within(0.0, 0.2, "capture"), without_massive=True):
                for layer in layers:
                    store.put(layer, n, found[layer][0])
                    norms[layer] += float(found[layer].norm()) / len(texts)
            rows = {layer: torch.stack([store.rows(layer, [2 * n + side for n in train]) for side in (0, 1)])
                    for layer in layers}
        signs = torch.ones(len(train), dtype=torch.float64)
        planes = {layer: plane for layer in layers if (plane := plane_of(rows, layer, signs)) is not None}
        if not planes:
            raise FitFailed("at no layer do the sides differ", param="pairs")

        def prompts(split: Any) -> list[Tokens]:
            return [texts[2 * n + side] for n in pairs.splits[split][:request.max_eval] for side in (0, 1)]

        trial = _Trial(request, work, readout, layers)
        span = work.within(0.2, 0.5, "fit")
        swept = {layer: trial.sweep(prompts("dev"), plane, layer, span.part(n, len(planes)))
                 for n, (layer, plane) in enumerate(planes.items())}
        layer = max(swept, key=lambda n: (max(swept[n]) - min(swept[n]), -n))
        plane, (up, down) = planes[layer], _best(request.angles, swept[layer])
        test = prompts("test")
        span = work.within(0.5, 1.0, "control")
        count = 4 * request.draws + 3
        before = trial.odds(test, None, span.part(0, count))
        moved = [trial.odds(test, trial.turning(plane, layer, angle), span.part(1, count)) for angle in (up, down)]
        harm = {str(angle): rounded(kl(work, prompts("test")[1::2], trial.turning(plane, layer, angle),
                                       span.part(2, count))) for angle in (up, down)}
        generator = request.generator(1)
        random: list[float] = []
        dealt: list[float] = []
        for n in range(request.draws):
            draw = torch.linalg.qr(torch.randn(work.facts.d_model, 2, generator=generator, dtype=torch.float64)).Q.T
            flips = torch.randint(0, 2, (len(train),), generator=generator).double() * 2 - 1
            shuffled = plane_of(rows, layer, flips)
            for n_kind, (results, other) in enumerate(((random, draw), (dealt, shuffled))):
                part = span.part(2 * n + n_kind + 3, count)
                if other is not None:
                    results.append(trial.reach(prompts("dev"), test, other.contiguous(), layer, part))
        if not dealt:
            raise FitFailed("shuffled labels give no plane to compare with", param="pairs")
        gap = moved[0] - moved[1]
        report: dict[str, Any] = {
            "method": self.name, "site": SITE, "best_layer": layer, "layers": trial.acting(layer),
            "pairs": {split: len(members) for split, members in pairs.splits.items()},
            "dev": {str(n): dict(zip(map(str, request.angles), map(rounded, odds), strict=True))
                    for n, odds in swept.items()},
            "angle_up": up, "angle_down": down,
            "test": {"log_odds": rounded(before), "up": rounded(moved[0]), "down": rounded(moved[1]), "kl": harm,
                     "prompts": len(test)},
            "controls": {"random_planes": standing(gap, random), "shuffled_labels": standing(gap, dealt)}}
        return Made(
            kind="subspace", op="rotate", site=SITE, numbers=dict.fromkeys(trial.acting(layer), {"basis": plane}),
            options={"angle": down, "adaptive": request.adaptive}, residual_norm=norms, report=report,
            sign_convention="0 degrees is along the behaviour, 180 opposite to it",
            dev={"up": rounded(max(swept[layer])), "down": rounded(min(swept[layer]))},
            test=report["test"],
            card={"source_layer": layer, "angle_up": up, "angle_down": down,
                  "random_percentile": report["controls"]["random_planes"]["percentile"],
                  "shuffled_percentile": report["controls"]["shuffled_labels"]["percentile"]},
            data={"data_hash": pairs.digest, "num_pairs": len(pairs.pairs), "readout": list(request.readout.target)})


class _Trial:
    """Planes tried out on prompts."""

    def __init__(self, request: AngularSteeringRequest, work: Work, readout: Readout, layers: Sequence[int]) -> None:
        self.request, self.work, self.readout, self.layers = request, work, readout, layers

    def acting(self, source: int) -> list[int]:
        """Layers at which the plane of a source layer acts."""
        return [layer for layer in self.layers if layer >= source]

    def turning(self, plane: torch.Tensor, source: int, angle: float) -> Program:
        return program_of(self.work.facts, "subspace", "rotate", SITE,
                          dict.fromkeys(self.acting(source), {"basis": plane}), scope=EVERYWHERE,
                          options={"angle": angle, "adaptive": self.request.adaptive})

    def odds(self, prompts: Sequence[Tokens], program: Program | None, span: Span) -> float:
        return float(self.readout.log_odds(prompts, span, program).mean())

    def sweep(self, prompts: Sequence[Tokens], plane: torch.Tensor, source: int, span: Span) -> list[float]:
        """Mean log-odds at every angle."""
        angles = self.request.angles
        return [self.odds(prompts, self.turning(plane, source, angle), span.part(n, len(angles)))
                for n, angle in enumerate(angles)]

    def reach(self, dev: Sequence[Tokens], test: Sequence[Tokens], plane: torch.Tensor, source: int, span: Span
              ) -> float:
        """Difference of log-odds on test between the angles that are best on dev."""
        up, down = _best(self.request.angles, self.sweep(dev, plane, source, span.part(0, 2)))
        return (self.odds(test, self.turning(plane, source, up), span.part(1, 2))
                - self.odds(test, self.turning(plane, source, down), span.part(1, 2)))


def plane_of(rows: dict[int, torch.Tensor], source: int, signs: torch.Tensor) -> torch.Tensor | None:
    """Orthonormal axes `[2, d]`, None where the sides do not differ.

    rows: layer -> `[2, n, d]` float64, positive and negative activations. signs `[n]`: -1 swaps the sides of a pair.
    """
    differences = {layer: (sides[0] - sides[1]) * signs.unsqueeze(1) for layer, sides in rows.items()}
    first = differences[source].mean(dim=0)
    scale = float(rows[source].norm(dim=-1).mean())
    if float(first.norm()) <= 1e-6 * scale:
        return None
    first = first / first.norm()
    means = torch.stack([pairs.mean(dim=0) for pairs in differences.values()])
    units = means / means.norm(dim=1, keepdim=True).clamp_min(1e-12)
    for candidates in (units, differences[source]):
        _, _, directions = torch.linalg.svd(candidates - candidates.mean(dim=0), full_matrices=False)
        second = directions[0] - (directions[0] @ first) * first
        if float((candidates - candidates.mean(dim=0)).norm()) > 1e-6 * float(candidates.norm()) \
                and float(second.norm()) > 1e-3:
            return torch.stack([first, second / second.norm()])
    return None


def _best(angles: Sequence[float], odds: Sequence[float]) -> tuple[float, float]:
    """Angles of the most and of the least log-odds."""
    return angles[odds.index(max(odds))], angles[odds.index(min(odds))]


METHOD = AngularSteering()
