"""What an intervention does to the massive activations of the model, in words for the receipt."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from steering.language.scope import PromptSelection, Scope
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.models.massive import MassiveLayer
from steering.ops.base import Row
from steering.ops.kernel import get_kernel

# An entry that changes by more is told of, and so is a change that lies in massive dims by more than this share.
CHANGED, MOSTLY = 0.1, 0.5


@dataclass(frozen=True)
class _Hit:
    """At one place. change: the largest relative change of a massive entry, share: how much of the squared change lies
    in massive dims, dims: those that change."""

    layer: int
    first: bool
    change: float
    share: float
    dims: tuple[int, ...]


def massive_warnings(rows: Mapping[tuple[Site, int], Row], scope: Scope, facts: ModelFacts) -> tuple[str, ...]:
    """Where the first position of the prompt is among the tokens touched, and where massive entries change.

    The change is that of a state which has the model's massive entries and is otherwise as large as states are; it is
    measured at resid_pre and resid_post. At attn_out and mlp_out it is only seen which dims are written.
    """
    found = facts.massive
    if found is None or not found.layers or not rows:
        return ()
    first = touches_first(scope)
    hits = []
    for (site, layer), row in sorted(rows.items()):
        known = found.at(site, layer)
        if known is not None:
            hits.append(_hit(row, site, layer, known, facts.d_model, first))
    told = []
    steered = [hit for hit in hits if hit.first]
    if steered:
        most = max(hit.change for hit in steered)
        told.append(f"the first position is steered at {_layers(steered)}, where the model keeps massive activations, "
                    f"which it changes by {100 * most:.2g} % at most; leave it out with "
                    '{"prompt": {"exclude": {"positions": [0]}}}')
    hard = [hit for hit in hits if hit.change > CHANGED or hit.share > MOSTLY]
    if hard:
        worst = max(hard, key=lambda hit: (hit.change, hit.share))
        dims = sorted({dim for hit in hard for dim in hit.dims})
        more = f", and an entry changes by {100 * worst.change:.0f} %" if worst.change > CHANGED else ""
        told.append(f"it acts on the massive dims {', '.join(map(str, dims))} at {_layers(hard)}: "
                    f"{100 * worst.share:.0f} % of its change lies there{more}. The model needs them as they are")
    return tuple(told)


def touches_first(scope: Scope) -> bool:
    """Whether the scope names the first position of every prompt."""
    prompt = scope.prompt
    if not isinstance(prompt, PromptSelection):
        return prompt == "all"
    if prompt.exclude is not None and _names_first(prompt.exclude.positions, prompt.exclude.windows):
        return False
    picks = (prompt.positions, prompt.windows, prompt.token_ids, prompt.roles)
    return all(pick is None for pick in picks) or _names_first(prompt.positions, prompt.windows)


def _names_first(positions: list[int] | None, windows: list[tuple[int | None, int | None]] | None) -> bool:
    return 0 in (positions or ()) or any(start in (None, 0) and stop != 0 for start, stop in windows or ())


def _hit(row: Row, site: Site, layer: int, known: MassiveLayer, width: int, first: bool) -> _Hit:
    values = {**known.every, **known.first} if first else dict(known.every)
    dims = sorted({*known.first, *known.every})
    state = torch.full((1, width), known.typical)
    if site in ("resid_pre", "resid_post"):
        for dim, value in values.items():
            state[0, dim] = value
    moved = get_kernel(row.kernel)(state.clone(), {name: tensor[None] for name, tensor in row.tensors.items()})
    change = (moved - state)[0].double()
    total = float(change.square().sum())
    share = float(change[dims].square().sum()) / total if total > 0 else 0.0
    relative = max((abs(float(change[dim])) / abs(values[dim]) for dim in values if values[dim]), default=0.0)
    changed = tuple(dim for dim in dims if float(change[dim]) != 0.0)
    return _Hit(layer, first and bool(known.first), relative if site in ("resid_pre", "resid_post") else 0.0, share,
                changed)


def _layers(hits: list[_Hit]) -> str:
    layers = sorted({hit.layer for hit in hits})
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
