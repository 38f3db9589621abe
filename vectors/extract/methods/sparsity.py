"""How sparse the inputs of a linear map are, and the thresholds under which its channels may be left out (CHESS, arXiv
2409.01366; TEAL, arXiv 2408.14690; lazy neurons: Li et al. 2023, arXiv 2210.06313).

Of a token x with the columns' lengths n, channel i contributes |x_i| n_i to the output. Train's tokens set the
thresholds; test's tokens tell which share they leave out of text that they were not set on. The first token of each
text is left out, because many models use it as a sink.

Smooth activations have hardly any zeros, so that laziness is a question of size: a channel is *lazy* if it is among the
largest tenth of contributions of less than one token in a hundred. Control: the same contributions dealt anew to the
channels, token by token, under which no channel is lazy but by chance.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from steering.models.facts import ModelFacts
from vectors.extract.items import Splits, digest_of, split_items
from vectors.extract.recipe import Made, Recipe, RecipeOptions, site_layers
from vectors.extract.refusals import FitFailed, LeakingSplit, TooFewExamples
from vectors.extract.standing import rounded
from vectors.extract.subject import Prompt, Subject, Tokens, WithWeights, encoded, stream
from vectors.extract.work import Span, Work

SHARES = tuple(n / 20 for n in range(1, 20))
TOLD = (0.25, 0.5, 0.65)
# Sizes that are held at a time; more layers are read in further passes.
MOST_BYTES = 2**28
FEWEST_TOKENS = 64
LARGEST, SELDOM, HELD = 0.1, 0.01, 0.9


class SparsityRequest(RecipeOptions):
    """Texts of the kind that is served."""

    prompts: Annotated[list[Prompt], Field(min_length=5, max_length=100_000)] = Field(
        description="Texts, conversations or token ids.")
    site: Literal["mlp_act", "head_out"] = Field(default="mlp_act", description="Whose linear map: the inputs of the "
                                                 "MLP's last one, or of the attention's.")
    max_calibration: int = Field(default=2048, ge=FEWEST_TOKENS, le=65_536, description="Most tokens that set "
                                 "thresholds, and most that test them.")
    leave_out_by: Literal["chess", "threshold", "wina", "magnitude"] = Field(
        default="chess", description="What the artifact leaves out by where a spec does not say.")
    share: float = Field(default=0.5, ge=0, le=0.95, description="How much of it.")


class Sparsity(Recipe):
    name = "sparsity"
    summary = "how sparse the inputs of a linear map are, and thresholds under which channels are left out"
    request = SparsityRequest
    ops = ("sparsify",)
    sites = ("mlp_act", "head_out")
    untried = "it is made to leave work out, not to change what the model writes; evaluate a spec with it for its cost"

    def prepare(self, request: SparsityRequest, subject: Subject) -> tuple[list[Tokens], Splits]:
        site_layers(request, request.site, subject.facts)
        texts = [encoded(subject, prompt, ("prompts", n)) for n, prompt in enumerate(request.prompts)]
        seen: dict[Tokens, int] = {}
        for n, text in enumerate(texts):
            if seen.setdefault(text, n) != n:
                raise LeakingSplit(f"the prompt is the same as prompts[{seen[text]}]", param=("prompts", n),
                                   fix="Leave it out.")
        splits = split_items([f"#{n}" for n in range(len(texts))], [None] * len(texts), request.seed, "prompts")
        for split in ("train", "test"):
            count = sum(len(texts[n]) - 1 for n in splits[split])
            if count < FEWEST_TOKENS:
                raise TooFewExamples(f"the {split} texts have {count} tokens behind their first ones, "
                                     f"{FEWEST_TOKENS} are the fewest", param="prompts",
                                     fix="Give more or longer ones.")
        return texts, splits

    def passes(self, request: SparsityRequest, data: tuple[list[Tokens], Splits], facts: ModelFacts) -> int:
        texts, splits = data
        groups = len(_groups(request, site_layers(request, request.site, facts), facts))
        return groups * sum(min(request.max_calibration, sum(len(texts[n]) for n in splits[split]))
                            for split in ("train", "test"))

    def make(self, request: SparsityRequest, data: tuple[list[Tokens], Splits], work: Work) -> Made:
        texts, splits = data
        subject = work.subject
        if not isinstance(subject, WithWeights):
            raise FitFailed("the weights of this model cannot be read", param="site")
        layers = site_layers(request, request.site, work.facts)
        train, test = ([texts[n] for n in splits[split]] for split in ("train", "test"))
        numbers: dict[int, dict[str, torch.Tensor]] = {}
        told: dict[str, dict[str, Any]] = {}
        groups = _groups(request, layers, work.facts)
        for n, group in enumerate(groups):
            span = work.within(n / len(groups), (n + 1) / len(groups), "capture")
            fitted = _sizes(request, subject, train, group, span.part(0, 2))
            for layer in group:
                numbers[layer] = thresholds(fitted.pop(layer), subject.columns(request.site, layer))
            held_out = _sizes(request, subject, test, group, span.part(1, 2))
            for layer in group:
                told[str(layer)] = described(held_out.pop(layer), numbers[layer], request.generator(layer))
        middle = told[str(layers[len(layers) // 2])]
        report: dict[str, Any] = {
            "method": self.name, "site": request.site, "layers": told,
            "texts": {split: len(members) for split, members in splits.items()}}
        return Made(
            kind="sparsity", op="sparsify", site=request.site, numbers=numbers, report=report,
            options={"method": request.leave_out_by, "share": request.share},
            sign_convention="what is under a threshold is left out", dev={},
            test={f"left_out_{share:g}": middle["left_out"][f"{share:g}"]["chess"] for share in TOLD},
            card={"middle_layer": middle},
            data={"data_hash": digest_of([texts, {s: list(m) for s, m in splits.items()}]), "num_texts": len(texts)})


def _groups(request: SparsityRequest, layers: Sequence[int], facts: ModelFacts) -> list[list[int]]:
    """Layers whose sizes fit into memory together."""
    each = max(1, MOST_BYTES // (4 * request.max_calibration * facts.width(request.site)))
    return [list(layers[n:n + each]) for n in range(0, len(layers), each)]


def _sizes(request: SparsityRequest, subject: Subject, texts: Sequence[Tokens], layers: Sequence[int], span: Span
           ) -> dict[int, torch.Tensor]:
    """By layer the sizes of the inputs, `[tokens, width]`."""
    chosen, left = [], request.max_calibration
    for text in texts:
        if left > 0:
            # One more, because the first is left out.
            chosen.append(text[:left + 1])
            left -= len(chosen[-1]) - 1
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for _, found in stream(subject, chosen, request.site, layers, None, span):
        for layer, h in found.items():
            parts[layer].append(h[1:].abs())
    return {layer: torch.cat(some) for layer, some in parts.items()}


def thresholds(size: torch.Tensor, norm: torch.Tensor) -> dict[str, torch.Tensor]:
    """The numbers of an artifact, from sizes `[tokens, width]` and lengths of columns `[width]`."""
    score = (size * norm).flatten().sort().values
    places = torch.tensor([int(share * len(score)) - 1 for share in SHARES]).clamp_min(0)
    by_channel = size.sort(dim=0).values
    rows = torch.tensor([int(share * len(size)) - 1 for share in SHARES]).clamp_min(0)
    return {"norm": norm, "shares": torch.tensor(SHARES), "cut": score[places], "thresholds": by_channel[rows]}


def described(size: torch.Tensor, numbers: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, Any]:
    """What sizes `[tokens, width]` of held-out text tell.

    zeros: share of exact zeros. needed: mean share of the channels that hold HELD of a token's squared contributions.
    lazy: share of lazy channels, and of the same contributions dealt anew. norm_variation: standard deviation of the
    columns' lengths over their mean; where it is 0, wina is magnitude. left_out: by the share that was asked for, what
    the thresholds leave out of these tokens.
    """
    norm = numbers["norm"]
    score = size * norm
    squares = score.double().square()
    ordered = squares.sort(dim=1, descending=True).values.cumsum(dim=1)
    needed = (ordered < HELD * ordered[:, -1:]).sum(dim=1).double().add(1) / size.shape[1]
    dealt = score.gather(1, torch.rand(score.shape, generator=generator).argsort(dim=1))
    left_out = {}
    for share in TOLD:
        place = min(range(len(SHARES)), key=lambda n: abs(SHARES[n] - share))
        left_out[f"{share:g}"] = {
            "chess": rounded(float((score <= numbers["cut"][place]).double().mean())),
            "threshold": rounded(float((size <= numbers["thresholds"][place]).double().mean()))}
    return {"zeros": rounded(float((size == 0).double().mean())), "needed": rounded(float(needed.mean())),
            "lazy": rounded(lazy(score)), "lazy_dealt": rounded(lazy(dealt)),
            "norm_variation": rounded(float(norm.std() / norm.mean())), "left_out": left_out, "tokens": len(size)}


def lazy(score: torch.Tensor) -> float:
    """Share of channels that are among the largest of less than SELDOM of the tokens, of contributions `[T, d]`."""
    count = max(1, int(LARGEST * score.shape[1]))
    often = torch.zeros(score.shape[1]).index_add(0, score.topk(count, dim=1).indices.flatten(),
                                                  torch.ones(len(score) * count)) / len(score)
    return float((often < SELDOM).double().mean())


METHOD = Sparsity()
