"""The check itself: base runs patched along a direction, its two parts, the whole activation and random directions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import InvalidRequest
from steering.language.intervention import Intervention
from steering.language.scope import PromptSelection, Scope
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.compiler import compile_program
from steering.programs.program import Program
from vectors.extract.subject import Subject, Tokens, answer_logprobs
from vectors.patching.report import Condition, PatchCheck, judged
from vectors.patching.split import Split, orthonormal, row_space, split

# Share done and stage; it raises when the work is cancelled.
Progress = Callable[[float, str], None]
# The invisible part is told of, and so is a split that says nothing.
SMALL = 0.01


@dataclass(frozen=True)
class Pair:
    """Two runs and the token that each answers with. Positions are counted from the start."""

    base: Tokens
    source: Tokens
    base_position: int
    source_position: int
    base_answer: int
    source_answer: int


@dataclass(frozen=True)
class Wanted:
    """directions: `[r, width]`. readers: by name, `[out, width]`."""

    site: Site
    layer: int
    directions: Tensor
    readers: Mapping[str, Tensor]
    tolerance: float
    draws: int
    seed: int


@dataclass(frozen=True)
class _Runs:
    """Activations `[pairs, width]` float64 of the unpatched runs, and their next tokens `[pairs, vocab]`."""

    pairs: Sequence[Pair]
    base: Tensor
    source: Tensor
    base_next: Tensor
    source_next: Tensor


def check(pairs: Sequence[Pair], wanted: Wanted, subject: Subject, progress: Progress) -> PatchCheck:
    """
    Raises:
        InvalidRequest: no pair is answered right.
        TrimtabError: as the model.
    """
    runs = _unpatched(pairs, wanted, subject, progress)
    parts = split(wanted.directions, row_space(list(wanted.readers.values()), wanted.tolerance))
    change = runs.source - runs.base
    along = change @ parts.whole.T @ parts.whole
    named = {"full": change, "direction": along}
    named |= {name: change @ part.T @ part for name, part in (("row", parts.row), ("null", parts.null)) if len(part)}
    named |= {f"random {n}": moved for n, moved in enumerate(_random(along, parts, wanted))}
    found = {}
    for n, (name, moved) in enumerate(named.items()):
        progress(n / len(named), "patch")
        found[name] = _patched(runs, moved, wanted, subject, progress, n / len(named))
    random = [one for name, one in found.items() if name.startswith("random")]
    ordered = torch.tensor([one.decrease for one in random], dtype=torch.float64)
    random_95 = float(ordered.quantile(0.95))
    row = found.get("row")
    clean = _condition(runs, runs.base_next, torch.zeros_like(change))
    separation, variance = _dormancy(runs, parts)
    return PatchCheck(
        verdict=judged(found["direction"].decrease, None if row is None else row.decrease, found["full"].decrease,
                       random_95),
        site=wanted.site, layer=wanted.layer, readers=list(wanted.readers), rank=len(parts.whole),
        width=parts.whole.shape[1], seen=parts.seen, row_norm=parts.row_norm, null_norm=parts.null_norm,
        pairs=len(runs.pairs), dropped=len(pairs) - len(runs.pairs), clean=clean, full=found["full"],
        direction=found["direction"], row=row, null=found.get("null"), random=random, random_95=random_95,
        dormancy=separation, dormancy_variance=variance, warnings=_warnings(parts, runs, len(pairs)))


def _unpatched(pairs: Sequence[Pair], wanted: Wanted, subject: Subject, progress: Progress) -> _Runs:
    """Of the pairs of which the model answers both runs rather with the answer of their own."""
    def step(share: float) -> None:
        progress(share, "read")

    base_next = answer_logprobs(subject, [pair.base for pair in pairs], step)
    source_next = answer_logprobs(subject, [pair.source for pair in pairs], step)
    kept = [n for n, pair in enumerate(pairs)
            if base_next[n, pair.base_answer] > base_next[n, pair.source_answer]
            and source_next[n, pair.source_answer] > source_next[n, pair.base_answer]]
    if not kept:
        raise InvalidRequest("of no pair does the model prefer the right answers by itself", param="pairs",
                             fix="Give pairs that the model can answer; an answer mostly begins with a space.")

    def read(text: Tokens, position: int) -> Tensor:
        found = subject.capture([text], wanted.site, [wanted.layer], [position])[0]
        return found[wanted.layer][0].double()

    base, source = [], []
    for done, n in enumerate(kept):
        step(done / len(kept))
        base.append(read(pairs[n].base, pairs[n].base_position))
        source.append(read(pairs[n].source, pairs[n].source_position))
    return _Runs([pairs[n] for n in kept], torch.stack(base), torch.stack(source), base_next[kept], source_next[kept])


def _random(along: Tensor, parts: Split, wanted: Wanted) -> list[Tensor]:
    """Changes `[pairs, width]` as long as those along the directions, within random directions that are the same for
    all pairs of a draw."""
    generator = torch.Generator().manual_seed(wanted.seed)
    coordinates = along @ parts.whole.T
    draws = []
    for _ in range(wanted.draws):
        basis = orthonormal(torch.randn(parts.whole.shape, generator=generator, dtype=torch.float64))
        draws.append(coordinates @ basis)
    return draws


def _patched(runs: _Runs, moved: Tensor, wanted: Wanted, subject: Subject, progress: Progress, share: float
             ) -> Condition:
    def step(_: float) -> None:
        progress(share, "patch")

    programs = [_program(subject.facts, wanted, pair.base_position, h + change)
                for pair, h, change in zip(runs.pairs, runs.base, moved, strict=True)]
    return _condition(runs, answer_logprobs(subject, [pair.base for pair in runs.pairs], step, programs), moved)


def _program(facts: ModelFacts, wanted: Wanted, position: int, activation: Tensor) -> Program:
    """The activation in the place of the base's own. What stays of it was read from the base run, so this is the patch
    of a part, written as a whole."""
    scope = Scope(prompt=PromptSelection(positions=[position]), generation="none")
    # Built without the checks of stored numbers, because an activation may be zero.
    payload = Payload("vector", {wanted.layer: {"vector": activation.float()}})
    source = Source("patched", "", payload, "patch", wanted.site)
    return compile_program([Resolved(Intervention(artifact="patched", scope=scope), source)], facts)


def _condition(runs: _Runs, found: Tensor, moved: Tensor) -> Condition:
    ours = torch.tensor([pair.base_answer for pair in runs.pairs])
    theirs = torch.tensor([pair.source_answer for pair in runs.pairs])

    def difference(logprobs: Tensor) -> Tensor:
        at = torch.arange(len(logprobs))
        return logprobs[at, ours] - logprobs[at, theirs]

    likely = runs.source_next.exp()
    kl = torch.where(likely > 0, likely * (runs.source_next - found), 0.0).sum(-1)
    return Condition(
        interchange=float((found.argmax(-1) == theirs).double().mean()),
        decrease=float(1 - difference(found).mean() / difference(runs.base_next).mean()), kl=float(kl.mean()),
        moved=float(moved.norm(dim=-1).mean()))


def _dormancy(runs: _Runs, parts: Split) -> tuple[float | None, float | None]:
    """Separation and variance along the visible part as shares of those along the directions."""
    if not len(parts.row):
        return None, None

    def apart(basis: Tensor) -> float:
        return float(((runs.source - runs.base) @ basis.T).norm(dim=-1).mean())

    def spread(basis: Tensor) -> float:
        return float((torch.cat([runs.base, runs.source]) @ basis.T).var(dim=0, correction=0).sum())

    return (apart(parts.row) / max(apart(parts.whole), 1e-300), spread(parts.row) / max(spread(parts.whole), 1e-300))


def _warnings(parts: Split, runs: _Runs, given: int) -> list[str]:
    found = []
    if parts.null_norm < SMALL:
        found.append("the readers see all of the direction, so the split cannot tell an illusion here; only the whole "
                     "activation can")
    if len(runs.pairs) < given:
        found.append(f"{given - len(runs.pairs)} of {given} pairs were left out, because the model does not answer "
                     "them")
    if float((runs.source - runs.base).norm(dim=-1).max()) == 0.0:
        found.append("base and source are the same at this place, so no patch changes anything; look at another "
                     "position")
    return found
