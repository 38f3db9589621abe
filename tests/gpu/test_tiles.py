"""The Triton form of the product of segments under replay: the grouping changes, addresses and shapes do not."""

import importlib

import numpy as np
import pytest
import torch

from steering.ops.segments import Segments, product
from tests.gpu.conftest import Replayed
from tests.steering.test_tiles import interpreted, numbers, runs, wanted

pytest.importorskip("triton")


def test_one_launch_serves_any_grouping(device: torch.device) -> None:
    """Only what is in table and activation changes between replays."""
    tiles = interpreted() if device.type == "cpu" else importlib.import_module("steering.ops.tiles")
    most, pool = 24, numbers(9, 4, 32).to(device)
    table = torch.full((tiles.most_tiles(most, 9), 3), tiles.EMPTY, dtype=torch.int32, device=device)
    x, out = torch.zeros(most, 32, device=device), torch.zeros(most, 4, device=device)
    graph = Replayed(lambda: tiles.tiled_product(x, pool.transpose(1, 2), table, out), device)
    for rows in ([0] * 24, [1, 4, 4, 8], [3] * 17 + [5] * 2, list(range(9))):
        table.copy_(tiles.table_of(runs(rows), len(table)))
        x[:len(rows)] = numbers(len(rows), 32).to(device)
        out.fill_(torch.nan)
        found = graph.replay().cpu()
        expected = wanted(x.cpu(), pool.cpu().transpose(1, 2), rows)
        np.testing.assert_allclose(found[:len(rows)].numpy(), expected, rtol=1e-4, atol=1e-4)
        assert bool(found[len(rows):].isnan().all()), "a tile without tokens wrote something"


def test_segments_on_the_device_equal_those_on_the_cpu(device: torch.device) -> None:
    """Through `product`, which takes the Triton form on a GPU."""
    rows = np.array([0] * 20 + [2] * 3 + [5], dtype=np.int64)
    pool, x = numbers(6, 64, 96), numbers(24, 96)
    found = product(x.to(device), pool.transpose(1, 2).to(device), Segments.of(rows, device)).cpu()
    np.testing.assert_allclose(found.numpy(), wanted(x, pool.transpose(1, 2), rows.tolist()), rtol=1e-4, atol=1e-4)
