"""The check of a patch: a planted illusion is found and a clean direction is not; parts are what they should be."""

from typing import Any

import pytest
import torch

from steering.language.errors import InvalidRequest
from tests.vectors.extract.toy import D_FF, D_MODEL, Toy, silent, unit
from vectors.patching.report import PatchCheck, judged
from vectors.patching.run import Pair, Wanted, check
from vectors.patching.split import orthonormal, row_space, split

LAYER = 1
# Neurons: one that differs between the runs and that nothing reads; one that is read and never differs; one that
# differs and is read; one that is neither.
HIDDEN, DORMANT, TRUE, IDLE = 0, 1, 2, 3
ANSWER = unit("answer")


class Planted(Toy):
    """The word of a prompt is "a" or "b", and so is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.w_down[LAYER] = 0.0
        self.w_down[LAYER, :, DORMANT] = ANSWER
        # With more that is read besides, so that the two can be told apart by what reads them.
        self.w_down[LAYER, :, TRUE] = ANSWER + unit("more")
        self.a, self.b = self.token("a"), self.token("b")

    def neurons(self, layer: int, ids: Any, resid: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(ids), D_FF, dtype=torch.float64)
        if layer == LAYER:
            sign = torch.tensor([{self.a: 1.0, self.b: -1.0}.get(token, 0.0) for token in ids], dtype=torch.float64)
            found[:, HIDDEN], found[:, TRUE], found[:, IDLE] = 3 * sign, 2 * sign, 1.0
        return found

    def embed(self, ids: Any) -> torch.Tensor:
        return torch.zeros(len(ids), D_MODEL, dtype=torch.float64)

    def read(self, ids: Any, resid: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(400, dtype=torch.float64) - 20
        # Of what is written for the answer alone.
        other = unit("more")
        said = resid @ (ANSWER - (ANSWER @ other) * other) / (1 - (ANSWER @ other) ** 2)
        logits[self.a], logits[self.b] = said, -said
        return logits


def axis(*neurons: int) -> torch.Tensor:
    found = torch.zeros(1, D_FF)
    found[0, list(neurons)] = 1.0
    return found


def checked(directions: torch.Tensor) -> PatchCheck:
    toy = Planted()
    texts = [toy.encode(text) for text in ("one a", "one b")]
    pairs = [Pair(texts[n], texts[1 - n], 2, 2, (toy.a, toy.b)[n], (toy.b, toy.a)[n]) for n in (0, 1)]
    wanted = Wanted("mlp_act", LAYER, directions, {"output projection": toy.w_down[LAYER]}, 1e-6, 20, 0)
    return check(pairs, wanted, toy, silent)


def test_a_planted_illusion_is_found_and_a_clean_direction_is_not() -> None:
    illusory = checked(axis(HIDDEN, DORMANT))
    assert illusory.verdict == "illusory"
    # Patching moves the dormant neuron by 3, which does as much again as half of what the model itself has there.
    assert illusory.direction.interchange == 1.0 and illusory.direction.decrease == pytest.approx(1.5, abs=1e-5)
    assert illusory.full.decrease == pytest.approx(2.0, abs=1e-5)
    assert illusory.row is not None and illusory.row.decrease == pytest.approx(0.0, abs=1e-5)
    assert illusory.null is not None and illusory.null.decrease == pytest.approx(0.0, abs=1e-5)
    assert illusory.dormancy == pytest.approx(0.0, abs=1e-6)
    assert (illusory.row_norm, illusory.null_norm) == (pytest.approx(0.5 ** 0.5), pytest.approx(0.5 ** 0.5))

    clean = checked(axis(TRUE))
    assert clean.verdict == "faithful" and clean.direction.decrease == pytest.approx(2.0, abs=1e-5)
    assert clean.dormancy == pytest.approx(1.0, abs=1e-5)
    assert clean.null is None and clean.warnings
    assert clean.random_95 < clean.direction.decrease

    nothing = checked(axis(IDLE))
    assert nothing.verdict == "no_effect" and nothing.row is None


def test_the_length_of_a_direction_and_the_basis_of_a_plane_do_not_matter() -> None:
    plain, longer = checked(axis(HIDDEN, DORMANT)), checked(5 * axis(HIDDEN, DORMANT))
    assert longer.direction.decrease == pytest.approx(plain.direction.decrease, abs=1e-6)
    assert (longer.row_norm, longer.verdict) == (pytest.approx(plain.row_norm), plain.verdict)
    plane = torch.cat([axis(HIDDEN), axis(TRUE)])
    turned = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) @ plane
    one, other = checked(plane), checked(turned)
    assert one.rank == other.rank == 2 and one.verdict == other.verdict == "faithful"
    assert one.direction.decrease == pytest.approx(other.direction.decrease, abs=1e-6)
    # The same plane, told by three directions.
    assert checked(torch.cat([plane, plane[:1]])).rank == 2


def test_random_directions_move_the_token_as_far() -> None:
    found = checked(axis(HIDDEN, DORMANT))
    assert len(found.random) == 20
    assert all(one.moved == pytest.approx(found.direction.moved, rel=1e-6) for one in found.random)


def test_the_parts_of_a_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    reader = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    space = row_space([reader], 1e-6)
    assert space.shape == (6, 20)
    v = torch.randn(1, 20, generator=generator, dtype=torch.float64)
    parts = split(v, space)
    projector = torch.linalg.pinv(reader) @ reader
    row = v @ projector
    assert torch.allclose(parts.row[0] * (parts.row[0] @ row[0]), row[0], atol=1e-9)
    assert float((reader @ parts.null[0]).norm()) < 1e-9
    assert parts.row_norm**2 + parts.null_norm**2 == pytest.approx(1.0)
    # Several readers see together what each sees; what one sees weakly is left out at a tolerance.
    weak = torch.zeros(30, 20, dtype=torch.float64)
    weak[0, 0], weak[1, 1] = 1.0, 0.01
    assert len(row_space([weak], 0.05)) == 1 and len(row_space([weak], 0.001)) == 2
    assert len(row_space([weak, torch.eye(20, dtype=torch.float64)], 0.05)) == 20
    assert not len(orthonormal(torch.zeros(2, 20, dtype=torch.float64)))


@pytest.mark.parametrize(("direction", "row", "full", "random", "verdict"), [
    (0.9, 0.9, 1.0, 0.1, "faithful"), (0.9, 0.4, 1.0, 0.1, "illusory"), (0.9, None, 1.0, 0.1, "illusory"),
    (0.9, 0.9, 0.2, 0.1, "illusory"), (0.05, 0.05, 1.0, 0.0, "no_effect"), (0.3, 0.3, 1.0, 0.4, "no_effect")])
def test_the_rule(direction: float, row: float | None, full: float, random: float, verdict: str) -> None:
    assert judged(direction, row, full, random) == verdict


def test_pairs_that_the_model_does_not_answer_are_left_out_and_told() -> None:
    toy = Planted()
    a, b = toy.encode("one a"), toy.encode("one b")
    wanted = Wanted("mlp_act", LAYER, axis(TRUE), {"output projection": toy.w_down[LAYER]}, 1e-6, 20, 0)
    good, wrong = Pair(a, b, 2, 2, toy.a, toy.b), Pair(a, b, 2, 2, toy.b, toy.a)
    found = check([good, wrong], wanted, toy, silent)
    assert (found.pairs, found.dropped) == (1, 1) and found.warnings
    with pytest.raises(InvalidRequest, match="prefer"):
        check([wrong], wanted, toy, silent)
