"""Move a token along the manifold of a concept's values, or put it on one of them (Wurgaft et al. 2026, arXiv
2605.05115).

Only the component in the manifold's subspace is replaced. What the paper leaves open is decided here: a path may begin
at the token's own place, found as the nearest of the manifold's sampled points (256 on a curve), and a shift stops at
an open end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from steering.artifacts.spline import Manifold as Shape
from steering.language.errors import InvalidSpec
from steering.language.fields import Finite, Fraction, Label, Switch
from steering.ops.base import VECTOR_SITES, Operation, Options, Place, Row, Tensors

Coordinate = Label | Finite | Annotated[list[Finite], Field(min_length=1, max_length=3)]


class ManifoldOptions(Options):
    """A label or a coordinate names a point. On a curve the coordinate is a place in the order of the labels, 1.5 being
    halfway between the second and the third; on a surface it is one number per axis."""

    target: Coordinate | None = Field(default=None, description="Where to: a label or a coordinate.")
    shift: Finite | Annotated[list[Finite], Field(min_length=1, max_length=3)] | None = Field(
        default=None, description="How far to go from where the token is: places on a curve, coordinates on a surface.")
    source: Coordinate | None = Field(
        default=None, description="Where the path to the target begins; left out: at the token's nearest point.")
    fraction: Fraction = Field(default=1.0, description="How much of the path to go.")
    path: Literal["manifold", "chord"] = Field(
        default="manifold", description="manifold: along it, the shorter way round; chord: straight, from the source, "
        "or from the token itself where no source is given.")
    keep_offset: Switch = Field(
        default=False, description="Move the token by the difference of the two points, so that it keeps its distance "
        "from the manifold; false: put it on the point. What is outside the subspace stays either way.")
    labels: list[Label] = Field(default=[], max_length=256, description="Names of the knots, in their order; a stored "
                                "manifold brings its own.")

    alternatives = (("target", "source"), ("shift",))

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.shift is not None and (self.target is not None or self.source is not None):
            raise ValueError("shift counts from where the token is; give it without target and source")
        if self.source is not None and self.target is None:
            raise ValueError("a source needs a target")
        if self.path == "chord" and self.shift is not None:
            raise ValueError("a shift goes along the manifold; give a target for a chord")
        if self.keep_offset and (self.source is not None or self.path == "chord"):
            raise ValueError("keep_offset needs the token's own place: leave source out, and path at manifold")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label occurs twice")
        return self


@dataclass(frozen=True)
class Journey:
    """Where a token goes: to the one goal `[r]`, or to `goals[k] [k, r]` from the k-th of `points`.

    share: of the way from where it is.
    """

    goals: torch.Tensor
    points: torch.Tensor | None = None
    share: float = 1.0


class Manifold(Operation):
    """With u = B (h - mean) for orthonormal rows B: h + scale B^T (goal - u), the goal being a point on the manifold or
    on a chord of it. keep_offset: h + scale B^T (goal - nearest), with the point of the manifold nearest to u.
    """

    name = "manifold"
    options = ManifoldOptions
    kinds = ("manifold",)
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: ManifoldOptions, place: Place) -> Row:
        basis, origin = tensors["basis"], tensors["basis"] @ tensors["mean"]
        journey = _journey(tensors, options)
        if journey.points is None:
            return Row("affine", {"up": place.scale * journey.share * basis, "down": -basis,
                                  "bias": journey.goals.float() + origin})
        return Row("nearest", {
            "basis": basis, "origin": origin, "points": journey.points.float(), "goals": journey.goals.float(),
            "keep": torch.tensor(float(options.keep_offset)), "amount": torch.tensor(place.scale)})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: ManifoldOptions, place: Place) -> torch.Tensor:
        basis, shape = tensors["basis"], shape_of(tensors)
        out = []
        for token in h:
            u = (basis @ (token - tensors["mean"])).double().unsqueeze(0)
            nearest = shape.nearest(u)
            if options.shift is not None:
                goal = shape.at(_shifted(shape, nearest, options, options.fraction))
            else:
                target = _coordinate(shape, options, "target")
                start = nearest if options.source is None else _coordinate(shape, options, "source")
                goal = shape.at(shape.way(start, target, options.fraction))
                if options.path == "chord":
                    begin = u if options.source is None else shape.at(start)
                    goal = begin + options.fraction * (shape.at(target) - begin)
            begin = shape.at(nearest) if options.keep_offset else u
            out.append(token + place.scale * (goal - begin)[0].float() @ basis)
        return torch.stack(out)


def shape_of(tensors: Tensors) -> Shape:
    """The manifold of one layer of an artifact."""
    return Shape.build(tensors["knots"], tensors["points"], tensors["period"])


def _journey(tensors: Tensors, options: ManifoldOptions) -> Journey:
    shape = shape_of(tensors)
    if options.labels and len(options.labels) != len(shape.knots):
        raise InvalidSpec(f"{len(options.labels)} labels for {len(shape.knots)} knots", param=("options", "labels"))
    if options.shift is not None:
        sampled = shape.sample()
        # A shift goes in the direction of its sign, even where the other way round is shorter.
        goals = shape.at(_shifted(shape, sampled, options, options.fraction))
        return Journey(goals, shape.at(sampled))
    target = _coordinate(shape, options, "target")
    goal = shape.at(target)[0]
    if options.source is not None:
        source = _coordinate(shape, options, "source")
        if options.path == "chord":
            start = shape.at(source)[0]
            return Journey(start + options.fraction * (goal - start))
        return Journey(shape.at(shape.way(source, target, options.fraction))[0])
    if options.path == "chord":
        return Journey(goal, share=options.fraction)
    if options.fraction == 1.0 and not options.keep_offset:
        return Journey(goal)
    sampled = shape.sample()
    return Journey(shape.at(shape.way(sampled, target, options.fraction)), shape.at(sampled))


def _shifted(shape: Shape, coordinates: torch.Tensor, options: ManifoldOptions, fraction: float) -> torch.Tensor:
    """Coordinates `[m, a]` moved by the shift: by places on a curve, by coordinates on a surface."""
    given = options.shift if isinstance(options.shift, list) else [options.shift]
    if len(given) != shape.axes:
        raise InvalidSpec(f"a shift of {len(given)} numbers; the manifold has {shape.axes} axes",
                          param=("options", "shift"))
    amount = fraction * torch.tensor(given, dtype=torch.float64)
    if shape.axes == 1:
        return shape.from_places(shape.to_places(coordinates) + amount[0])
    return shape.inside(coordinates + amount)


def _coordinate(shape: Shape, options: ManifoldOptions, name: str) -> torch.Tensor:
    """Coordinates `[1, a]` of a label, a place or a coordinate.

    Raises:
        InvalidSpec: unknown, or off the manifold.
    """
    param, given = ("options", name), getattr(options, name)
    if given is None:
        raise InvalidSpec("neither a target nor a shift is given", param="options",
                          fix=f"Give a target or a shift. {_known(options.labels)}")
    if isinstance(given, str):
        if given not in options.labels:
            raise InvalidSpec(f"no knot is called {given!r}", param=param, fix=_known(options.labels))
        return shape.knots[options.labels.index(given)].unsqueeze(0)
    values = given if isinstance(given, list) else [given]
    if len(values) != shape.axes:
        raise InvalidSpec(f"{len(values)} coordinates for a manifold with {shape.axes} axes", param=param)
    # Rounded as the knots are, so that the number of an outermost knot is that knot.
    wanted = torch.tensor([values], dtype=torch.float32).double()
    if shape.axes == 1:
        last = len(shape.knots) - 1
        if shape.period[0] == 0 and not 0 <= values[0] <= last:
            raise InvalidSpec(f"place {values[0]:g} is off the manifold, which has places 0 to {last}", param=param)
        return shape.from_places(wanted[0])
    inside = shape.inside(wanted)
    open_axes = shape.period == 0
    if bool((inside != wanted)[0, open_axes].any()):
        raise InvalidSpec("the coordinate is off the manifold", param=param,
                          fix="Stay between the outermost knots of every axis that does not wrap.")
    return inside


def _known(labels: Sequence[str]) -> str:
    if not labels:
        return "The manifold has no labels; name coordinates."
    shown = ", ".join(labels[:20])
    return f"Labels: {shown}{', ...' if len(labels) > 20 else ''}."


OPERATION = Manifold()
