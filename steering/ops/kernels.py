"""The batched forms of the residual-like ops: add, affine, clamp, nearest, rotate, sign flip, scale and offset."""

import torch

from steering.ops.kernel import Rows, kernel
from steering.ops.segments import Segmented, down, up

# Numbers of stored points that are copied for every token, at most, when few tokens share them.
COPIED = 4096


@kernel("add")
def add(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """h + delta. delta `[n, d]`."""
    return h + rows["delta"]


@kernel("add_norm_match")
def add_norm_match(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """h + |h| delta, with delta = strength times a unit vector. delta `[n, d]`."""
    length: torch.Tensor = h.norm(dim=-1, keepdim=True)
    return h + length * rows["delta"]


@kernel("add_preserve_norm")
def add_preserve_norm(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(h + delta) |h| / |h + delta|. delta `[n, d]`."""
    moved = h + rows["delta"]
    length = moved.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, moved * (h.norm(dim=-1, keepdim=True) / length.clamp_min(1e-30)), h)


@kernel("affine", matrices={"up": 0, "down": 0, "bias": 0})
def affine(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """h + up^T (down h + bias). up, down `[n, r, d]`, bias `[n, r]`. Also ablation and subspace patching."""
    # The products return new tensors, so those can be changed in place.
    return up(down(h, rows, "down").add_(rows["bias"]), rows, "up").add_(h)


@kernel("clamp")
def clamp(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Move the coordinate along the unit `direction [n, d]` into [low, high] (`[n]`), by the share `amount [n]`."""
    coordinate = (h * rows["direction"]).sum(-1)
    bounded = torch.minimum(torch.maximum(coordinate, rows["low"]), rows["high"])
    return h + (rows["amount"] * (bounded - coordinate)).unsqueeze(-1) * rows["direction"]


@kernel("nearest", matrices={"basis": 0, "origin": 0, "points": 1, "goals": 1})
def nearest(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Find the token among stored points of a subspace and carry it to the goal that belongs to that point.

    basis `[n, r, d]` orthonormal, origin `[n, r]` what is 0 in it, points and goals `[n, k, r]`. keep 1: the token
    moves by goal - point, keep 0: onto the goal; amount: share of the move. Both `[n]`.
    """
    inside = down(h, rows, "basis") - rows["origin"]
    point, goal = _nearest(inside, rows)
    start = torch.where(rows["keep"].unsqueeze(-1) > 0, point, inside)
    return up(rows["amount"].unsqueeze(-1) * (goal - start), rows, "basis").add_(h)


def _nearest(inside: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """For tokens `inside [n, r]` the nearest of each one's points, and its goal, both `[n, r]`."""
    if isinstance(rows, Segmented) and rows.segments is not None:
        points, goals, segments = rows.whole("points"), rows.whole("goals"), rows.segments
        if len(inside) >= 4 * len(segments.rows) or points[0].numel() > COPIED:
            found = [_nearest_of(inside[run], points[row], goals[row]) for row, run in segments.runs()]
            return torch.cat([point for point, _ in found]), torch.cat([goal for _, goal in found])
    points, goals = rows["points"], rows["goals"]
    if len(points) == 1:
        return _nearest_of(inside, points[0], goals[0])
    distance = (points - inside.unsqueeze(1)).square().sum(-1)
    chosen = distance.argmin(dim=-1).view(-1, 1, 1).expand(-1, 1, inside.shape[1])
    return points.gather(1, chosen).squeeze(1), goals.gather(1, chosen).squeeze(1)


def _nearest_of(inside: torch.Tensor, points: torch.Tensor, goals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with one set of points and goals `[k, r]`."""
    # Not by a product of matrices, which rounds away what tells near points apart.
    place = torch.cdist(inside, points, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=-1)
    return points[place], goals[place]


@kernel("rotate", matrices={})
def rotate(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Turn within the plane of the orthonormal `plane [n, 2, d]`.

    absolute 1: to the in-plane angle given by cos, sin; absolute 0: by that angle. adaptive 1: only tokens with a
    positive coordinate on the first axis. All `[n]`.
    """
    x, y = down(h, rows, "plane").T
    radius = torch.sqrt(x * x + y * y)
    absolute = rows["absolute"] > 0
    new_x = torch.where(absolute, radius * rows["cos"], x * rows["cos"] - y * rows["sin"])
    new_y = torch.where(absolute, radius * rows["sin"], x * rows["sin"] + y * rows["cos"])
    change = up(torch.stack([new_x - x, new_y - y], dim=-1), rows, "plane")
    idle = (rows["adaptive"] > 0) & (x <= 0)
    return torch.where(idle.unsqueeze(-1), h, h + change)


@kernel("sign_flip")
def sign_flip(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Flip signs of the dims where `polarity [n, d]` is not 0.

    mode `[n]`: 0 away (dims whose sign agrees), 1 toward (dims whose sign disagrees), 2 flip (all). Of the pattern's
    dims only the `count [n]` largest by magnitude are acted on. amount `[n]`: 1 flips, 0.5 sets to zero.
    """
    polarity, mode = rows["polarity"], rows["mode"].unsqueeze(-1)
    listed = polarity != 0
    agreement = torch.sign(h) * polarity
    wanted = torch.where(mode == 0, agreement > 0, torch.where(mode == 1, agreement < 0, listed)) & listed
    chosen = wanted
    # Sorting costs ten times all the rest, and a look at the counts costs next to nothing on a CPU.
    if h.device.type != "cpu" or bool((rows["count"] < listed.sum(-1)).any()):
        magnitude = torch.where(listed, h.abs(), torch.full_like(h, -1.0))
        order = magnitude.argsort(dim=-1, descending=True, stable=True)
        largest = torch.arange(h.shape[1], device=h.device) < rows["count"].unsqueeze(-1)
        chosen = wanted & torch.zeros_like(wanted).scatter(-1, order, largest.expand_as(order))
    return torch.where(chosen, h * (1 - 2 * rows["amount"].unsqueeze(-1)), h)


@kernel("scale_offset")
def scale_offset(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """h * scale + offset, both `[n, width]`. Masks of dims, neurons and heads, head shifts, full patches."""
    return h * rows["scale"] + rows["offset"]
