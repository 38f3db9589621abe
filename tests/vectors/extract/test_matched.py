"""Random sets that are like a given one: the same draws as by the plain reading of the rule."""

import pytest
import torch

from vectors.extract.matched import matched_draw


def plainly(chosen: list[int], size: torch.Tensor, generator: torch.Generator, pool: int) -> list[int]:
    taken: set[int] = set()
    for unit in chosen:
        free = [other for other in range(len(size)) if other not in taken and other not in chosen]
        near = sorted(free, key=lambda other: (abs(float(size[other]) - float(size[unit])), other))[:pool]
        near = near or [other for other in range(len(size)) if other not in taken]
        taken.add(near[int(torch.randint(len(near), (), generator=generator))])
    return sorted(taken)


@pytest.mark.parametrize(("units", "count"), [(12, 3), (12, 6), (12, 9), (12, 12), (40, 11)])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_are_those_of_the_rule(units: int, count: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(units + count)
    size = torch.rand(units, generator=generator, dtype=torch.float64)
    size = (4 * size).round() if ties else size
    chosen = sorted(torch.randperm(units, generator=generator)[:count].tolist())
    for seed in range(5):
        mine, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        drawn = matched_draw(chosen, size, mine)
        assert drawn == plainly(chosen, size, theirs, 4)
        assert len(set(drawn)) == count
