"""The selection rule of the refusal direction: of many mean differences, the one whose ablation takes the behaviour
away, leaves the rest alone, and whose addition brings it about (Arditi et al. 2024, arXiv 2406.11717).

Candidates are the differences of means of `resid_pre` at each of the last tokens and each layer. On dev, the behaviour
is the log-odds of its first answer tokens. A candidate must come from a layer below 80 per cent of depth; ablated at
every site of every layer it must leave the next token after negative prompts alone (KL at most `max_kl`); added at its
layer it must raise the behaviour's log-odds after negative prompts above `min_induced`. Of those, the one with the
lowest log-odds after positive prompts under ablation is taken, and test is read once; the standard errors on the card
are those of the changes over its prompts. Of many candidates, a few prompts of dev first say which are worth all of it.
Any behaviour that positive prompts bring about and negative ones do not will do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from vectors.extract.answers import MOST_QUESTIONS, AnsweredOptions
from vectors.extract.contrasts import text_of
from vectors.extract.data import Dataset
from vectors.extract.programs import EVERYWHERE, adding, program_of
from vectors.extract.readout import Readout, ReadoutOptions, make_readout
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import FitFailed, TooFewExamples
from vectors.extract.scratch import Scratch
from vectors.extract.standing import mean_error, random_like, rounded, standing
from vectors.extract.subject import Subject, Tokens, answer_logprobs, stream
from vectors.extract.text_pairs import TextPairs, paired
from vectors.extract.trial.plan import Question
from vectors.extract.work import Span, Work

SITE: Site = "resid_pre"
MAX_DEPTH = 0.8
# Candidates that are all tried on all of dev. Of more, FIRST_SCOUTS prompts of either side say which twice FINALISTS go
# on, and SCOUTS prompts, as many again among them, which FINALISTS do.
MOST_CANDIDATES, FIRST_SCOUTS, SCOUTS, FINALISTS = 24, 2, 4, 8
# Test prompts on which random and dealt directions are compared with the one that was found.
CONTROL_PROMPTS = 8
# (position, layer).
Candidate = tuple[int, int]


class RefusalDirectionRequest(AnsweredOptions):
    """Prompts that bring the behaviour about (positive) and prompts that do not."""

    pairs: TextPairs
    readout: ReadoutOptions = Field(description="Answers that are the behaviour.")
    num_positions: int = Field(default=3, ge=1, le=32, description="Last tokens of the prompt to take candidates from.")
    max_kl: float = Field(default=0.1, gt=0, le=100, description="Most harm to negative prompts, in nats.")
    min_induced: float = Field(default=0.0, description="Least log-odds that adding the direction must reach.")
    max_eval: int = Field(default=32, ge=2, le=1000, description="Most pairs of dev and of test to score.")
    op: Literal["ablate", "clamp", "add"] = Field(
        default="ablate", description="ablate: at every site and layer; clamp: set the coordinate to that of the "
        "negative prompts, at its layer; add: bring the behaviour about.")


class RefusalDirection(Recipe):
    name = "refusal_direction"
    summary = "direction without which a behaviour goes and with which it comes, chosen by effect"
    request = RefusalDirectionRequest
    without_massive = True
    ops = ("ablate", "add",)
    sites = (SITE,)
    scope = EVERYWHERE
    effect = "random_percentile"

    def prepare(self, request: RefusalDirectionRequest, subject: Subject) -> tuple[Dataset, Readout]:
        self._layers(request, subject.facts)
        data = paired(request.pairs, subject, request.seed)
        if min(len(side) for pair in data.pairs for side in (pair.positive, pair.negative)) < request.num_positions:
            raise TooFewExamples(f"a prompt has fewer than {request.num_positions} tokens", param="num_positions")
        return data, make_readout(request.readout, subject)

    def questions(self, request: RefusalDirectionRequest, data: tuple[Dataset, Readout]) -> list[Question]:
        """Positive prompts, whose behaviour is to go; for a direction to add negative ones, where it is to come."""
        side: Literal["positive", "negative"] = "negative" if request.op == "add" else "positive"
        return [Question(getattr(data[0].pairs[n], side), text_of(getattr(request.pairs[n], side)) or "")
                for n in data[0].splits["test"][:MOST_QUESTIONS]]

    def _layers(self, request: RefusalDirectionRequest, facts: ModelFacts) -> list[int]:
        layers = [n for n in site_layers(request, SITE, facts) if n < MAX_DEPTH * facts.num_layers]
        if not layers:
            raise FitFailed(f"no layer below {MAX_DEPTH:.0%} of depth is given", param="layers")
        return layers

    def passes(self, request: RefusalDirectionRequest, data: tuple[Dataset, Readout], facts: ModelFacts) -> int:
        pairs, _ = data
        read = sum(len(pair.positive) + len(pair.negative) for pair in pairs.pairs)
        length = read / (2 * len(pairs.pairs))
        count = len(self._layers(request, facts)) * request.num_positions
        dev, test = (min(request.max_eval, len(pairs.splits[split])) for split in ("dev", "test"))
        tried = count * dev if count <= MOST_CANDIDATES else (
            count * min(FIRST_SCOUTS, dev) + FINALISTS * (2 * (SCOUTS - FIRST_SCOUTS) + dev))
        return round(read + length * (3 * tried + dev + 3 * request.draws * min(CONTROL_PROMPTS, test) + 6 * test))

    def make(self, request: RefusalDirectionRequest, data: tuple[Dataset, Readout], work: Work) -> Made:
        facts = work.facts
        layers = self._layers(request, facts)
        pairs, readout = data
        texts = [text for pair in pairs.pairs for text in (pair.positive, pair.negative)]
        positions = list(range(-request.num_positions, 0))
        norms = dict.fromkeys(layers, 0.0)

        def side(split: Literal["train", "dev", "test"], which: int) -> list[Tokens]:
            return [texts[2 * n + which] for n in pairs.splits[split][:request.max_eval]]

        with Scratch(layers, len(texts), request.num_positions * facts.d_model) as store:
            for n, found in stream(work.subject, texts, SITE, layers, positions,
                                   work.within(0.0, 0.3, "capture"), without_massive=True):
                for layer in layers:
                    store.put(layer, n, found[layer].flatten())
                    norms[layer] += float(found[layer].norm(dim=-1).mean()) / len(texts)
            train = pairs.splits["train"]
            sides = {layer: tuple(store.rows(layer, [2 * n + which for n in train]) for which in (0, 1))
                     for layer in layers}
        width = facts.d_model
        candidates: dict[tuple[int, int], torch.Tensor] = {}
        for layer in layers:
            difference = sides[layer][0].mean(dim=0) - sides[layer][1].mean(dim=0)
            for i, position in enumerate(positions):
                part = difference[i * width:(i + 1) * width]
                # At the first block a template's own token is the same in every prompt.
                if float(part.norm()) > 1e-6 * norms[layer]:
                    candidates[position, layer] = part
        if not candidates:
            raise FitFailed("no token of the prompts' ends differs between the sides", param="num_positions",
                            fix="Take more positions.")

        harmful, harmless = side("dev", 0), side("dev", 1)
        kept = list(candidates)
        if len(kept) > MOST_CANDIDATES:
            span = work.within(0.3, 0.6, "fit")
            first = _tried(request, work, readout, candidates, (harmful[:FIRST_SCOUTS], harmless[:FIRST_SCOUTS]),
                           span.part(0, 2))
            kept = _promising(request, first)[:2 * FINALISTS]
            more = slice(FIRST_SCOUTS, SCOUTS)
            if harmful[more]:
                second = _tried(request, work, readout, {key: candidates[key] for key in kept},
                                (harmful[more], harmless[more]), span.part(1, 2))
                share = len(harmful[more]) / len(harmful[:SCOUTS])
                first = {key: {name: first[key][name] + share * (value - first[key][name])
                               for name, value in own.items()} for key, own in second.items()}
            kept = _promising(request, {key: first[key] for key in kept})[:FINALISTS]
        tried = _tried(request, work, readout, {key: candidates[key] for key in kept}, (harmful, harmless),
                       work.within(0.6, 0.8, "fit"))
        allowed = [key for key, score in tried.items() if _passes(request, score)]
        draft = None
        if not allowed:
            # The gentlest one is kept, so that what was tried can be looked at.
            allowed = [min(tried, key=lambda key: (tried[key]["kl"], key))]
            gentlest = tried[allowed[0]]
            draft = (f"none of {len(candidates)} candidates passes: the gentlest has KL {gentlest['kl']:.3g} where "
                     f"max_kl is {request.max_kl:g}, and induces log-odds {gentlest['induced']:.3g} where min_induced "
                     f"is {request.min_induced:g}; check the spelling of the readout")
        best = min(allowed, key=lambda key: (tried[key]["ablated"], key))
        position, layer = best
        vector = candidates[best]

        start = positions.index(position) * width
        own = [rows[:, start:start + width] for rows in sides[layer]]
        effect, control = self._test(request, work, readout, side("test", 0), side("test", 1), layer, vector, own)
        unit = vector / vector.norm()
        report: dict[str, Any] = {
            "method": self.name, "site": SITE, "best_layer": layer, "best_position": position,
            "pairs": {split: len(members) for split, members in pairs.splits.items()},
            "candidates": [{"position": p, "layer": n, **{name: rounded(value) for name, value in score.items()},
                            "allowed": _passes(request, score)} for (p, n), score in tried.items()],
            "test": effect, "controls": control}
        options: dict[str, Any] = {}
        if request.op == "ablate":
            options = {"multi_site": True, "source_layer": layer}
        elif request.op == "clamp":
            options = {"value": float((own[1] @ unit).mean())}
        return Made(
            kind="vector", op=request.op, site=SITE, numbers={layer: {"vector": vector}}, options=options,
            default_layers=None if request.op == "ablate" else [layer],
            residual_norm={layer: norms[layer]}, sigma={layer: float((torch.cat(own) @ unit).std(correction=0))},
            sign_convention="the direction points to the behaviour", report=report,
            dev={"positive_ablated": rounded(tried[best]["ablated"]),
                 "negative_induced": rounded(tried[best]["induced"]), "negative_kl": rounded(tried[best]["kl"])},
            test=effect,
            card={"source_layer": layer, "position": position,
                  "random_percentile": control["ablation_vs_random"]["percentile"],
                  "shuffled_percentile": control["ablation_vs_shuffled"]["percentile"]},
            data={"data_hash": pairs.digest, "num_pairs": len(pairs.pairs), "readout": list(request.readout.target)},
            draft=draft)

    def _test(self, request: RefusalDirectionRequest, work: Work, readout: Readout, harmful: list[Tokens],
              harmless: list[Tokens], layer: int, vector: torch.Tensor, own: Sequence[torch.Tensor]
              ) -> tuple[dict[str, Any], dict[str, Any]]:
        span, generator = work.within(0.8, 1.0, "control"), request.generator(1)
        count = 3 * request.draws + 5

        def each(texts: list[Tokens], n: int, program: Program | None) -> torch.Tensor:
            return readout.log_odds(texts, span.part(n, count), program)

        def odds(texts: list[Tokens], n: int, program: Program | None) -> float:
            return float(each(texts, n, program).mean())

        untouched, harmless_untouched = each(harmful, 0, None), each(harmless, 1, None)
        before, harmless_before = float(untouched.mean()), float(harmless_untouched.mean())
        taken = each(harmful, 2, ablating(work.facts, vector))
        brought = each(harmless, 3, adding(work.facts, SITE, layer, vector, EVERYWHERE))
        ablated, induced = float(taken.mean()), float(brought.mean())
        harm = kl(work, harmless, ablating(work.facts, vector), span.part(4, count))
        random, shuffled, random_induced = [], [], []
        # Draws answer some of the prompts, and are compared with what was found on these.
        few, few_harmless = harmful[:CONTROL_PROMPTS], harmless[:CONTROL_PROMPTS]
        few_before = float(untouched[:CONTROL_PROMPTS].mean())
        few_harmless_before = float(harmless_untouched[:CONTROL_PROMPTS].mean())
        pooled = torch.cat(list(own))
        for n in range(request.draws):
            draw = random_like(vector, generator)
            random.append(few_before - odds(few, 3 * n + 5, ablating(work.facts, draw)))
            random_induced.append(odds(few_harmless, 3 * n + 6, adding(work.facts, SITE, layer, draw, EVERYWHERE))
                                  - few_harmless_before)
            order = torch.randperm(len(pooled), generator=generator)
            half = len(pooled) // 2
            dealt = pooled[order[:half]].mean(dim=0) - pooled[order[half:]].mean(dim=0)
            shuffled.append(few_before - odds(few, 3 * n + 7, ablating(work.facts, dealt)))
        effect = {"positive_log_odds": rounded(before), "positive_ablated": rounded(ablated),
                  "positive_ablated_error": rounded(mean_error(untouched - taken)),
                  "negative_induced_error": rounded(mean_error(brought - harmless_untouched)),
                  "negative_log_odds": rounded(harmless_before), "negative_induced": rounded(induced),
                  "negative_kl": rounded(harm)}
        gone = few_before - float(taken[:CONTROL_PROMPTS].mean())
        come = float(brought[:CONTROL_PROMPTS].mean()) - few_harmless_before
        return effect, {"ablation_vs_random": standing(gone, random), "ablation_vs_shuffled": standing(gone, shuffled),
                        "induction_vs_random": standing(come, random_induced)}


def ablating(facts: ModelFacts, vector: torch.Tensor) -> Program:
    """The direction taken out at every site of every layer, of all tokens."""
    return program_of(facts, "vector", "ablate", SITE, {0: {"vector": vector}}, scope=EVERYWHERE,
                      options={"multi_site": True, "source_layer": 0})


def _tried(request: RefusalDirectionRequest, work: Work, readout: Readout,
           candidates: Mapping[Candidate, torch.Tensor], prompts: tuple[Sequence[Tokens], Sequence[Tokens]], span: Span
           ) -> dict[Candidate, dict[str, float]]:
    """What each candidate does on prompts of both sides, means over them."""
    harmful, harmless = prompts
    base = answer_logprobs(work.subject, harmless, span.part(0, len(candidates) + 1))
    found = {}
    for n, (key, candidate) in enumerate(candidates.items()):
        share = span.part(n + 1, len(candidates) + 1)
        without = ablating(work.facts, candidate)
        induced = adding(work.facts, SITE, key[1], candidate, EVERYWHERE)
        found[key] = {
            "ablated": float(readout.log_odds(harmful, share.part(0, 3), without).mean()),
            "kl": kl(work, harmless, without, share.part(1, 3), base),
            "induced": float(readout.log_odds(harmless, share.part(2, 3), induced).mean())}
    return found


def _promising(request: RefusalDirectionRequest, some: Mapping[Candidate, Mapping[str, float]]) -> list[Candidate]:
    """What passes on some prompts first, the gentlest of the rest behind it."""
    return sorted(some, key=lambda key: (not _passes(request, some[key]), some[key]["ablated"]
                                         if _passes(request, some[key]) else some[key]["kl"]))


def _passes(request: RefusalDirectionRequest, score: Mapping[str, float]) -> bool:
    return score["kl"] <= request.max_kl and score["induced"] >= request.min_induced


def kl(work: Work, texts: Sequence[Tokens], program: Program, span: Span, base: torch.Tensor | None = None) -> float:
    """Mean KL of the next token without the program from that with it, in nats. base: the log-probabilities without it,
    where they are known."""
    if base is None:
        base = answer_logprobs(work.subject, texts, span.part(0, 2))
    changed = answer_logprobs(work.subject, texts, span.part(1, 2), program)
    return float((base.exp() * (base - changed)).sum(dim=1).mean())


METHOD = RefusalDirection()
