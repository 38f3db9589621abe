"""The Triton form of the product of segments: run by Triton's interpreter against numpy, and compiled for a GPU."""

import importlib.util
from types import ModuleType

import numpy as np
import pytest
import torch

from steering.ops.segments import Segments

triton = pytest.importorskip("triton")


def interpreted() -> ModuleType:
    """A copy of the module whose kernel is for the interpreter, which Triton decides where a kernel is defined."""
    spec = importlib.util.find_spec("steering.ops.tiles")
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(copy)
    return copy


@pytest.fixture(scope="module")
def tiles() -> ModuleType:
    return interpreted()


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def runs(rows: list[int]) -> list[tuple[int, slice]]:
    return list(Segments.of(np.array(rows), torch.device("cpu")).runs())


def wanted(x: torch.Tensor, matrices: torch.Tensor, rows: list[int]) -> np.ndarray:
    return np.stack([x[n].double().numpy() @ matrices[row].double().numpy() for n, row in enumerate(rows)])


@pytest.mark.parametrize("rows", [[2], [0] * 16, [0] * 17, [1] * 5 + [3] * 40 + [6], list(range(7))], ids=len)
@pytest.mark.parametrize(("rank", "width"), [(1, 40), (64, 96), (5, 130)])
def test_products_equal_numpy(tiles: ModuleType, rows: list[int], rank: int, width: int) -> None:
    """Segments of one token, of just a tile, of one more; ranks and widths that no block divides; both directions."""
    pool, table = numbers(7, rank, width), tiles.table_of(runs(rows))
    assert len(table) <= tiles.most_tiles(len(rows), len(set(rows)))
    h = numbers(len(rows), width)
    down = tiles.tiled_product(h, pool.transpose(1, 2), table)
    np.testing.assert_allclose(down.numpy(), wanted(h, pool.transpose(1, 2), rows), rtol=1e-4, atol=1e-4)
    up = tiles.tiled_product(down, pool, table)
    np.testing.assert_allclose(up.numpy(), wanted(down, pool, rows), rtol=1e-4, atol=1e-3)


def test_the_most_tiles_are_reached(tiles: ModuleType) -> None:
    """The bound holds for every grouping of up to 40 tokens by up to 4 rows, and one of them needs all of it."""
    g = np.random.default_rng(0)
    for tokens in range(1, 41):
        counts = [len(tiles.table_of(runs(np.sort(g.integers(0, 4, tokens)).tolist()))) for _ in range(20)]
        assert max(counts) <= tiles.most_tiles(tokens, 4)
    rows = [0] * 17 + [1] * 17 + [2]
    assert len(tiles.table_of(runs(rows))) == tiles.most_tiles(len(rows), 3)


def test_the_kernel_compiles_for_a_gpu() -> None:
    """For a Hopper GPU, down to its machine code, which needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from steering.ops import tiles

    kernel = tiles._product
    constants = {"TILE": tiles.TILE, "COLUMNS": tiles.COLUMNS, "DEPTH": tiles.DEPTH}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("x", "matrices", "out"), "*fp32") | {
        "table": "*i32"} | dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(fn=kernel, signature=types, constexprs=constants), GPUTarget("cuda", 90, 32),
                          {"enable_fp_fusion": True})
    assert "ld.global" in made.asm["ptx"]
    # TF32 would show as a product of tensor cores.
    assert "tf32" not in made.asm["ptx"]
