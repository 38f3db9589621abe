"""Sign patterns: which single dims keep a sign of their own on the tokens of a category (Nalagatla 2026, arXiv
2606.12629).

What the paper leaves open is decided here: a token is read behind what the tokenizer puts before every text (a begin
token, say; `prefix` in the report says how many; a line break where it puts nothing and the model keeps massive
activations at the first position), so not at the attention sink where there is one; a zero counts as negative;
massive dims of the model, and dims whose mean magnitude is over 50 times the median dim's (medians cannot be
streamed), are left out; anchors are split 60/20/20, the layer is chosen on dev; of a large vocabulary a random sample
is read, and the standard error of every AUC says what that and the few anchors leave open.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from steering.language.errors import InvalidRequest
from steering.language.gates import Reading
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from vectors.extract.answers import AnsweredOptions
from vectors.extract.contract import Split
from vectors.extract.items import Splits, digest_of, split_items
from vectors.extract.plain import massive_dims
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import EmptyText, LeakingSplit, NoContrast
from vectors.extract.standing import auc, auc_error, rounded, standing
from vectors.extract.subject import Subject, Tokens, stream
from vectors.extract.work import Span, Work
from vectors.scratch import ScratchFolder

MASSIVE = 50.0
# Dims of a pattern none of whose dims is good enough.
DRAFT_DIMS = 8


class SignPatternRequest(AnsweredOptions):
    """Tokens of a category."""

    anchors: Annotated[list[str], Field(min_length=1, max_length=10_000)] = Field(
        description="Texts of one token each, spelled as they follow other text (most with a space before them).")
    splits: list[Split] | None = Field(default=None, max_length=100_000, description="Fixed split of each anchor.")
    single_token: bool = Field(default=False, description="Leave out anchors that are more than one token.")
    site: Site = Field(default="resid_post", description="Where signs are read, and later flipped.")
    min_auc: float = Field(default=0.75, gt=0.5, le=1, description="Dims at least this good are in the pattern.")
    vocabulary_sample: int = Field(default=8192, ge=100, description="Random tokens of the vocabulary to compare the "
                                   "category with; at least as many as it has for all of them.")


Anchors = tuple[list[int], Splits, Tokens]
"""Tokens of the category, splits of them, and what the tokenizer puts before every text."""


class SignPattern(Recipe):
    name = "sign_pattern"
    summary = "dims whose sign tells the tokens of a category from the rest of the vocabulary"
    request = SignPatternRequest
    ops = ("sign_flip",)
    sites = ()
    untried = "words of a category do not say what the model should write where their signs are flipped"

    def prepare(self, request: SignPatternRequest, subject: Subject) -> Anchors:
        anchors, given = _anchors(request, subject)
        _vocabulary(request, subject.facts.vocab_size, anchors)
        site_layers(request, request.site, subject.facts)
        return (anchors, split_items([str(token) for token in anchors], given, request.seed, "anchors"),
                _prefix(subject))

    def passes(self, request: SignPatternRequest, data: Anchors, facts: ModelFacts) -> int:
        anchors, _, prefix = data
        return min(request.vocabulary_sample + len(anchors), facts.vocab_size) * (len(prefix) + 1)

    def make(self, request: SignPatternRequest, data: Anchors, work: Work) -> Made:
        anchors, splits, prefix = data
        layers = site_layers(request, request.site, work.facts)
        ids = _vocabulary(request, work.facts.vocab_size, anchors)
        row = {token: n for n, token in enumerate(ids)}
        known = {layer: massive_dims(work.facts, request.site, layer) for layer in layers}
        with TypeCache(layers, len(ids), work.facts.width(request.site), known) as cache:
            cache.fill(work.subject, request.site, prefix, ids, work.within(0.0, 0.7, "capture"))
            own = {split: [row[anchors[n]] for n in members] for split, members in splits.items()}
            rest = [n for n, token in enumerate(ids) if token not in set(anchors)]
            span = work.within(0.7, 0.85, "fit")
            found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            dev, test, errors = {}, {}, {}
            patterns = {layer: prototype(cache, layer, own["train"], request.min_auc) for layer in layers}
            draft = None
            if not any(patterns.values()):
                # The best dims are kept, so that what was tried can be looked at.
                draft = f"no dim reaches an AUC of {request.min_auc} at any layer; the best {DRAFT_DIMS} are kept"
                patterns = {layer: prototype(cache, layer, own["train"], request.min_auc, least=DRAFT_DIMS)
                            for layer in layers}
            for done, (layer, pattern) in enumerate(patterns.items()):
                span(done / len(layers))
                if pattern is not None:
                    found[layer] = pattern
                    dev[layer] = _auc(cache, layer, pattern, own["dev"], rest)[0]
                    test[layer], errors[layer] = _auc(cache, layer, pattern, own["test"], rest)
            best = max(found, key=lambda layer: (dev[layer], layer))
            shuffled, span = [], work.within(0.85, 1.0, "control")
            generator = request.generator(1)
            for n in range(request.draws):
                span(n / request.draws)
                dealt = torch.randperm(len(ids), generator=generator)[:len(anchors)].tolist()
                fitted, scored = dealt[:len(own["train"])], dealt[len(own["train"]):]
                pattern = prototype(cache, best, fitted, request.min_auc, least=len(found[best][0]))
                others = [k for k in range(len(ids)) if k not in set(dealt)]
                # A null set of dims as large as the pattern: a threshold that nothing reaches would be no control.
                shuffled.append(_auc(cache, best, pattern, scored, others)[0] if pattern is not None else 0.5)
            norms, massive = cache.mean_norm, {layer: len(cache.massive(layer)) for layer in layers}
        layer_reports = {str(n): {"dims": len(dims), "dev_auc": rounded(dev[n]), "test_auc": rounded(test[n]),
                                  "test_auc_error": rounded(errors[n]), "massive_dims_left_out": massive[n]}
                         for n, (dims, _) in found.items()}
        control = standing(test[best], shuffled)
        report: dict[str, Any] = {
            "method": self.name, "site": request.site, "best_layer": best, "layers": layer_reports,
            "anchors": {split: len(members) for split, members in splits.items()},
            "anchors_left_out": len(request.anchors) - len(anchors), "vocabulary": len(ids),
            "vocabulary_size": work.facts.vocab_size,
            "prefix": len(prefix), "controls": {"random_anchors": control}}
        return Made(
            kind="sign_pattern", op="sign_flip", site=request.site,
            numbers={n: {"dims": dims, "polarity": polarity} for n, (dims, polarity) in found.items()},
            options={"mode": "away"}, reading=Reading(form="agreement", pool="mean"),
            default_layers=[best], residual_norm=norms, report=report,
            sign_convention="polarity is the sign of the category's tokens; mode away takes the concept out",
            dev={"auc": rounded(dev[best])}, test={"auc": rounded(test[best]), "auc_error": rounded(errors[best])},
            card={"dims": len(found[best][0]),
                  "shuffled_percentile": control["percentile"], "shuffled_max_auc": control["max"]},
            data={"data_hash": digest_of([anchors, {s: list(m) for s, m in splits.items()}]),
                  "num_anchors": len(anchors)}, draft=draft)


class TypeCache:
    """The signs of every token's activation, one bit a dim, `[num_layers, num_tokens, width / 8]` in a file."""

    def __init__(self, layers: Sequence[int], num_tokens: int, width: int,
                 known: Mapping[int, Sequence[int]] | None = None) -> None:
        """known: dims of each layer that are massive in this model, whatever their size here."""
        self._known = known or {}
        self.layers, self.num_tokens, self.width = tuple(layers), num_tokens, width
        self.mean_norm: dict[int, float] = {}
        self._size = torch.zeros(len(layers), width, dtype=torch.float64)
        self._positive = torch.zeros(len(layers), width, dtype=torch.float64)
        self._folder = ScratchFolder()
        self._bits: npt.NDArray[np.uint8] = self._folder.array(
            "signs", np.uint8, (len(self.layers), num_tokens, (width + 7) // 8))

    def __enter__(self) -> "TypeCache":
        return self

    def __exit__(self, *_: object) -> None:
        del self._bits
        self._folder.cleanup()

    def fill(self, subject: Subject, site: Site, prefix: Sequence[int], ids: Sequence[int], span: Span) -> None:
        """Read every token alone behind `prefix`."""
        norms = torch.zeros(len(self.layers), dtype=torch.float64)
        for n, found in stream(subject, [(*prefix, token) for token in ids], site, self.layers, [-1], span):
            rows = torch.stack([found[layer][0] for layer in self.layers]).double()
            self._size += rows.abs()
            self._positive += (rows > 0)
            norms += rows.norm(dim=1)
            self._bits[:, n] = np.packbits((rows > 0).numpy(), axis=1)
        self.mean_norm = {layer: float(norms[i]) / len(ids) for i, layer in enumerate(self.layers)}

    def signs(self, layer: int, tokens: Sequence[int]) -> torch.Tensor:
        """`[len(tokens), width]` int8, 1 for positive, else -1."""
        bits = np.unpackbits(self._bits[self.layers.index(layer)][list(tokens)], axis=1, count=self.width)
        return torch.from_numpy(bits.astype(np.int8) * 2 - 1)

    def positive_rate(self, layer: int, own: torch.Tensor) -> torch.Tensor:
        """Share of tokens whose dim is positive, `[width]`, without those whose signs are `own [n, width]`."""
        inside = (own > 0).sum(dim=0).double()
        return (self._positive[self.layers.index(layer)] - inside) / (self.num_tokens - len(own))

    def massive(self, layer: int) -> list[int]:
        size = self._size[self.layers.index(layer)]
        large = torch.nonzero(size > MASSIVE * size.median()).flatten().tolist()
        return sorted({*large, *self._known.get(layer, ())})


def prototype(cache: TypeCache, layer: int, anchors: Sequence[int], min_auc: float, *, least: int = 0
              ) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(dims `[m]`, polarity `[m]`) of the category, best dims first; None if no dim is good enough.

    least: take at least that many dims, however bad.
    """
    own = cache.signs(layer, anchors)
    gap = (own > 0).double().mean(dim=0) - cache.positive_rate(layer, own)
    # For a score of two values the area under the curve is half of one plus the gap of the rates.
    scores = 0.5 + gap.abs() / 2
    scores[cache.massive(layer)] = 0.0
    order = torch.argsort(scores, descending=True, stable=True)
    dims = order[:max(int((scores >= min_auc).sum()), least)]
    return (dims, torch.where(gap[dims] >= 0, 1, -1)) if len(dims) else None


def agreement(signs: torch.Tensor, dims: torch.Tensor, polarity: torch.Tensor) -> torch.Tensor:
    """Share of the pattern's dims that have its sign, per row of `signs [n, width]`: the category's probe."""
    return (signs[:, dims] == polarity).double().mean(dim=1)


def _auc(cache: TypeCache, layer: int, pattern: tuple[torch.Tensor, torch.Tensor], own: Sequence[int],
         rest: Sequence[int]) -> tuple[float, float]:
    """With its standard error."""
    scores = agreement(cache.signs(layer, own), *pattern), torch.cat(
        [agreement(cache.signs(layer, rest[n:n + 4096]), *pattern) for n in range(0, len(rest), 4096)])
    return auc(*scores), auc_error(*scores)


def _prefix(subject: Subject) -> Tokens:
    """What stands before every token that is read."""
    found = subject.facts.massive
    own = subject.encode("")
    if own or found is None or not any(layer.first for layer in found.layers.values()):
        return own
    return subject.encode("\n")


def _anchors(request: SignPatternRequest, subject: Subject) -> tuple[list[int], list[Split | None]]:
    """Tokens and their given splits."""
    if request.splits is not None and len(request.splits) != len(request.anchors):
        raise InvalidRequest(f"{len(request.splits)} splits for {len(request.anchors)} anchors", param="splits")
    tokens: list[int] = []
    splits: list[Split | None] = []
    for n, text in enumerate(request.anchors):
        ids = subject.encode_continuation(text) if text.strip() else ()
        if not ids:
            raise EmptyText("the anchor is empty", param=("anchors", n))
        if len(ids) != 1 and request.single_token:
            continue
        if len(ids) != 1:
            raise InvalidRequest(f"{text[:40]!r} is {len(ids)} tokens to this model, an anchor is one",
                                 param=("anchors", n), fix="Put a space before it, or set single_token to leave out "
                                                            "such anchors.")
        if ids[0] in tokens:
            raise LeakingSplit(f"the token repeats anchors[{tokens.index(ids[0])}]", param=("anchors", n),
                               fix="Leave it out.")
        tokens.append(ids[0])
        splits.append(None if request.splits is None else request.splits[n])
    if not tokens:
        raise InvalidRequest("no anchor is a single token to this model", param="anchors",
                             fix="Put a space before them.")
    return tokens, splits


def _vocabulary(request: SignPatternRequest, vocab_size: int, anchors: Sequence[int]) -> list[int]:
    if len(anchors) > vocab_size // 2:
        raise NoContrast("over half of the vocabulary are anchors", param="anchors")
    if request.vocabulary_sample >= vocab_size:
        return list(range(vocab_size))
    drawn = torch.randperm(vocab_size, generator=request.generator(0))[:request.vocabulary_sample].tolist()
    return sorted({*drawn, *anchors})


METHOD = SignPattern()
