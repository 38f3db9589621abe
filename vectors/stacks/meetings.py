"""Where one intervention acts on what another left: what is left of each, by the server's own kernels on activations.

Nothing is run on the model for it. At the residual stream a change that an earlier layer made comes along, so an
intervention meets those of earlier layers as well; what the layers between make of the change is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops.base import Row
from steering.ops.kernel import get_kernel
from steering.programs.program import Compiled
from vectors.stacks.report import Meeting

Place = tuple[Site, int]
# What changes the residual stream, in the order in which a layer comes to it.
STREAM: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
READ: tuple[Site, ...] = ("resid_pre", "resid_post")
# Directions of a change that are looked at, by the share of its squared length that they hold.
MOST_DIRECTIONS, HELD = 4, 0.99
MOST_SHARED, MOST_MEETINGS = 64, 4
# Less than this of a change is rounding.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Seen:
    """Untouched activations by place, `[tokens, width]`, and which interventions touch which of the tokens,
    `[interventions, tokens]`."""

    activations: Mapping[Place, Tensor]
    touched: Tensor


def places(compiled: Sequence[Compiled]) -> dict[Site, list[int]]:
    """Sites and layers that a stack acts at."""
    found: dict[Site, set[int]] = {}
    for item in compiled:
        for site, layer in item.rows:
            found.setdefault(site, set()).add(layer)
    return {site: sorted(layers) for site, layers in found.items()}


def meetings(first: int, second: int, compiled: Sequence[Compiled], seen: Seen, facts: ModelFacts
             ) -> tuple[list[tuple[int, int]], list[Meeting]]:
    """Of two interventions of a stack, `first < second`: for each meeting (the one that acts earlier, the other), most
    telling first."""
    found: list[tuple[tuple[int, int], Meeting]] = []
    both = seen.touched[first] & seen.touched[second]
    if not bool(both.any()):
        return [], []
    for place in compiled[first].rows:
        for other in compiled[second].rows:
            if place == other:
                found.append(((first, second), _meeting(compiled[first].rows[place], place,
                                                        compiled[second].rows[other], other, both, seen, facts)))
            elif all(site in STREAM for site, _ in (place, other)):
                early, late = (first, second) if _depth(place) < _depth(other) else (second, first)
                start, end = (place, other) if early == first else (other, place)
                if end[0] in READ:
                    found.append(((early, late), _meeting(compiled[early].rows[start], start, compiled[late].rows[end],
                                                          end, both, seen, facts)))
    found.sort(key=lambda one: -_telling(one[1]))
    found = found[:MOST_MEETINGS]
    return [who for who, _ in found], [meeting for _, meeting in found]


def disturbs(meeting: Meeting) -> bool:
    """Whether the two do not simply add up where they meet."""
    return meeting.kept is None or abs(meeting.kept - 1) > 0.05 or (meeting.order or 0.0) > 0.01


def _telling(meeting: Meeting) -> float:
    return 10.0 if meeting.kept is None else abs(meeting.kept - 1) + (meeting.order or 0.0) + meeting.overlap / 100


def _depth(place: Place) -> tuple[int, int]:
    return place[1], STREAM.index(place[0])


def _meeting(early: Row, start: Place, late: Row, end: Place, both: Tensor, seen: Seen, facts: ModelFacts) -> Meeting:
    h = seen.activations[end][both]
    change = applied(early, seen.activations[start][both]) - seen.activations[start][both]
    own = applied(late, h) - h
    kept = exchanged = order = None
    # A change that is not finite is that of a router which may not choose an expert.
    if bool(change.isfinite().all()) and bool(own.isfinite().all()):
        after = applied(late, h + change)
        kept = _share(after - h - own, change)
        if start == end:
            other = applied(early, h + own)
            exchanged = _share(other - h - own, change)
            lengths = float(change.norm() + own.norm())
            order = float((after - other).norm()) / lengths if lengths else 0.0
    alike, overlap = _overlap(change, own, h)
    return Meeting(site=end[0], layer=end[1], from_site=start[0], from_layer=start[1], tokens=int(both.sum()),
                   kept=kept, exchanged=exchanged, order=order, cosine=alike, overlap=overlap,
                   shared=_shared(change, own, end[0], facts) if start == end else [])


def applied(row: Row, h: Tensor) -> Tensor:
    """What a row makes of `h [tokens, width]`."""
    return get_kernel(row.kernel)(h.float(), {name: tensor.unsqueeze(0) for name, tensor in row.tensors.items()})


def _share(left: Tensor, change: Tensor) -> float:
    """How much of a change there is in what is left."""
    size = float((change * change).sum())
    return float((left * change).sum()) / size if size else 1.0


def _overlap(one: Tensor, other: Tensor, h: Tensor) -> tuple[float, float]:
    """Largest cosine between the subspaces of two changes, plain and by the coordinates of activations along them."""
    a, b = _directions(one), _directions(other)
    if not len(a) or not len(b):
        return 0.0, 0.0
    centred = h.double() - h.double().mean(0)
    return _largest(a.T, b.T), _largest(centred @ a.T, centred @ b.T)


def _largest(a: Tensor, b: Tensor) -> float:
    """Largest canonical correlation between columns `[n, k]` and `[n, m]`."""
    first, second = (torch.linalg.svd(one, full_matrices=False) for one in (a, b))
    left, right = (u[:, s > 1e-9 * max(float(s.max()), 1e-300)] for u, s, _ in (first, second))
    if not left.shape[1] or not right.shape[1]:
        return 0.0
    return min(float(torch.linalg.svdvals(left.T @ right).max()), 1.0)


def _directions(change: Tensor) -> Tensor:
    """Orthonormal rows along which tokens are moved."""
    change = change.double().nan_to_num(posinf=1e6, neginf=-1e6)
    if not bool(change.any()):
        return change[:0]
    _, s, rows = torch.linalg.svd(change, full_matrices=False)
    held = (s**2).cumsum(0) / (s**2).sum()
    count = min(int((held < HELD).sum()) + 1, MOST_DIRECTIONS)
    found: Tensor = rows[:count]
    return found


def _shared(one: Tensor, other: Tensor, site: Site, facts: ModelFacts) -> list[int]:
    """Neurons, heads or experts that two sets both change."""
    if site not in ("head_out", "mlp_act", "router"):
        return []
    found = []
    for change in (one, other):
        columns = change.nan_to_num(nan=1.0).abs().amax(0) > 0
        if site == "head_out":
            columns = columns.view(facts.num_heads, facts.head_dim).any(1)
        found.append(columns)
    if all(bool(columns.all()) for columns in found):
        return []
    return torch.nonzero(found[0] & found[1]).flatten().tolist()[:MOST_SHARED]
