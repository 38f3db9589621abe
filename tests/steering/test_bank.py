"""Slots and rows: who is resident, what is on the device, and what a step does, against a loop over tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from steering.acting.steerer import Steerer, apply_stage
from steering.artifacts.source import Resolved
from steering.language.intervention import Intervention
from steering.language.scope import Scope
from steering.language.vocabulary import Site
from steering.models.describe import model_facts
from steering.ops import get_kernel
from steering.ops.base import Row
from steering.programs.compiler import compile_program
from steering.programs.program import Applied, Compiled, Program
from steering.residency.bank import Bank
from steering.residency.plan import plan_step
from steering.residency.pool import pad_rank
from tests.steering.rows import after
from tests.tiny import tiny

torch.set_num_threads(1)
CPU = torch.device("cpu")
D = 6
Rows = dict[tuple[Site, int], Row]


def program(*rows: Rows) -> Program:
    blank = Applied(None, "add", (), (), {}, {})
    return Program(tuple(Compiled("add", Scope(), item, blank) for item in rows))


def numbered(value: float, layer: int = 0) -> Program:
    return program({("resid_post", layer): Row("add", {"delta": torch.full((D,), float(value))})})


def held(bank: Bank, slot: int, item: Program) -> None:
    """The device must hold exactly the rows of `item` in `slot`."""
    cells = {(key, j) for key, cell in bank.cells.items() for j in np.flatnonzero(cell.pool[slot] >= 0)}
    assert cells == {(key, j) for j, compiled in enumerate(item.compiled) for key in compiled.rows}
    for j, compiled in enumerate(item.compiled):
        for key, row in compiled.rows.items():
            pool = bank.pools[bank.cells[key].pool[slot, j]]
            assert pool.kernel == row.kernel
            for name, wanted in pad_rank(row).tensors.items():
                assert torch.equal(pool.tensors[name][bank.cells[key].row[slot, j]], wanted)


def test_programs_of_a_pass_are_all_there_at_once() -> None:
    bank = Bank(3, CPU)
    programs = [numbered(i) for i in range(4)]
    slots = bank.hold([*programs[:3], programs[0]])
    assert sorted(slots[:3]) == [1, 2, 3] and slots[3] == slots[0]
    for slot, item in zip(slots[:3], programs[:3], strict=True):
        held(bank, slot, item)
    with pytest.raises(ValueError, match="4 programs in one pass, and 3 slots"):
        bank.hold(programs)
    # One that is not wanted makes room, though another one has been used less recently.
    bank.hold([programs[1]])
    (slot,) = set(bank.hold([programs[0], programs[2], programs[3]])) - {slots[0], slots[2]}
    assert slot == slots[1]
    held(bank, slot, programs[3])


def test_the_least_recently_used_goes_first() -> None:
    bank = Bank(3, CPU)
    a, b, c, d = (numbered(i) for i in range(4))
    slots = {item.digest: bank.hold([item])[0] for item in (a, b, c, a)}
    assert bank.hold([d]) == [slots[b.digest]]
    before = bank.version
    # a and c are still there: nothing is loaded.
    assert bank.hold([a, c]) == [slots[a.digest], slots[c.digest]]
    assert bank.version == before


def test_equal_rows_are_stored_once_and_counted() -> None:
    bank = Bank(4, CPU)
    row = Row("add", {"delta": torch.arange(float(D))})
    same = Row("add", {"delta": torch.arange(float(D))})
    one = program({("resid_post", 0): row, ("resid_post", 1): same}, {("resid_pre", 0): row})
    two = program({("attn_out", 2): same})
    bank.hold([one, two])
    assert [pool.num_rows for pool in bank.pools] == [1]
    # Eviction of one user must not take the row away from the other.
    slot = bank.hold([two, *(numbered(50 + i) for i in range(3))])[0]
    held(bank, slot, two)
    assert bank.pools[0].num_rows == 4


@pytest.mark.parametrize(("rank", "padded"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (9, 16)])
def test_padded_ranks_do_the_same(rank: int, padded: int) -> None:
    g = torch.Generator().manual_seed(rank)
    row = Row("affine", {"up": torch.randn(rank, D, generator=g), "down": torch.randn(rank, D, generator=g),
                         "bias": torch.randn(rank, generator=g)})
    wide = pad_rank(row)
    assert {name: len(t) for name, t in wide.tensors.items()} == {"up": padded, "down": padded, "bias": padded}
    h = torch.randn(1, D, generator=g)
    results = [get_kernel("affine")(h, {n: t[None] for n, t in r.tensors.items()}) for r in (row, wide)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_padded_tables_do_the_same(rank: int) -> None:
    g = torch.Generator().manual_seed(rank)
    row = Row("nearest", {"basis": torch.linalg.qr(torch.randn(D, rank, generator=g)).Q.T,
                          "origin": torch.randn(rank, generator=g), "points": torch.randn(7, rank, generator=g),
                          "goals": torch.randn(7, rank, generator=g), "keep": torch.tensor(0.0),
                          "amount": torch.tensor(0.8)})
    wide = pad_rank(row)
    assert wide.tensors["points"].shape == (7, 1 << (rank - 1).bit_length())
    h = torch.randn(1, D, generator=g)
    results = [get_kernel("nearest")(h, {n: t[None] for n, t in r.tensors.items()}) for r in (row, wide)]
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], h)


def _random_row(g: np.random.Generator) -> Row:
    def draw(*shape: int) -> torch.Tensor:
        return torch.tensor(g.normal(size=shape), dtype=torch.float32)

    kind = g.integers(4)
    if kind == 0:
        return Row("add", {"delta": draw(D)})
    if kind == 1:
        return Row("scale_offset", {"scale": draw(D), "offset": draw(D)})
    if kind == 2:
        return Row("clamp", {"direction": draw(D), "low": torch.tensor(-0.2), "high": torch.tensor(0.3),
                             "amount": torch.tensor(1.0)})
    rank = int(g.integers(1, 6))
    return Row("affine", {"up": draw(rank, D), "down": draw(rank, D), "bias": draw(rank)})


KEYS: list[tuple[Site, int]] = [("resid_post", 0), ("resid_post", 1), ("attn_out", 1)]


def _random_program(seed: int) -> Program:
    g = np.random.default_rng(seed)
    return program(*({key: _random_row(g) for key in KEYS if g.random() < 0.6} for _ in range(g.integers(1, 5))))


def test_two_thousand_programs_through_eight_slots() -> None:
    """Device memory must reach its level early and stay there; whatever is loaded must be what was asked for."""
    bank = Bank(8, CPU)
    levels = []
    g = np.random.default_rng(0)
    running: list[Program] = []
    for i in range(2000):
        item = _random_program(i)
        running.append(item)
        held(bank, bank.hold(running)[-1], item)
        if len(running) > 7:
            running.pop(int(g.integers(len(running))))
        levels.append(bank.nbytes)
    # 8 programs of up to 4 interventions at 3 sites: at most 96 rows a pool, kept in a power of two.
    assert all(pool.capacity <= 128 and pool.num_rows <= 96 for pool in bank.pools)
    assert levels[-1] == levels[1000], "the bank still grows after 1000 programs"
    assert len(bank.cells) == len(KEYS)
    for slot, item in zip(bank.hold(running), running, strict=True):
        held(bank, slot, item)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.data())
def test_step_equals_a_loop_over_tokens(seeds: list[int], data: st.DataObject) -> None:
    bank = Bank(4, CPU)
    drawn = list(map(_random_program, seeds))
    programs = dict(zip(bank.hold(drawn), drawn, strict=True))
    slots = np.array(data.draw(st.lists(st.sampled_from([0, *programs]), min_size=1, max_size=8)), dtype=np.int32)
    bits = np.array(data.draw(st.lists(st.integers(0, 15), min_size=len(slots), max_size=len(slots))), dtype=np.uint32)
    plan = plan_step(bank, slots, bits)
    h = torch.randn(len(slots), D, generator=torch.Generator().manual_seed(seeds[0]))
    for key in KEYS:
        stepped = h
        for stage in plan.get(key, ()):
            stepped = apply_stage(stepped, stage)
        for t, (slot, mask) in enumerate(zip(slots.tolist(), bits.tolist(), strict=True)):
            token = h[t:t + 1]
            touched = False
            for j, item in enumerate(programs[slot].compiled if slot else ()):
                if mask >> j & 1 and key in item.rows:
                    token = after(item.rows[key], token)
                    touched = True
            if touched:
                torch.testing.assert_close(stepped[t:t + 1], token, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(stepped[t:t + 1], token), "an untouched token changed"


def test_bits_beyond_the_program_and_of_slot_0_mean_nothing() -> None:
    bank = Bank(1, CPU)
    (slot,) = bank.hold([numbered(3)])
    bits = np.array([2**32 - 1, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    plan = plan_step(bank, np.array([0, slot, slot], dtype=np.int32), bits)
    (stage,) = plan[("resid_post", 0)]
    assert stage.tokens is not None
    assert stage.tokens.tolist() == [2]
    assert plan_step(bank, np.zeros(3, dtype=np.int32), bits) == {}
    assert plan_step(bank, np.array([], dtype=np.int32), np.array([], dtype=np.uint32)) == {}


def test_slot_of_an_evicted_program_acts_as_the_new_one_only() -> None:
    """The old one acted at other sites and with more interventions; nothing of it may be left in the slot."""
    bank = Bank(1, CPU)
    old = _random_program(3)
    bank.hold([old])
    new = numbered(1, layer=1)
    (slot,) = bank.hold([new])
    plan = plan_step(bank, np.array([slot], dtype=np.int32), np.array([2**32 - 1], dtype=np.uint32))
    assert list(plan) == [("resid_post", 1)]
    assert len(plan[("resid_post", 1)]) == 1


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


def _last_hidden(model: PreTrainedModel, specs: list[list[dict[str, Any]]]) -> torch.Tensor:
    """Output of the last block, `[request, token, width]`, with spec i acting on request i."""
    facts = model_facts(model, model_id="tiny", fingerprint="")
    programs = [compile_program([Resolved(Intervention.model_validate(item)) for item in spec],
                                facts) for spec in specs]
    bank = Bank(len(specs), CPU)
    steerer = Steerer(model, bank)
    ids = torch.arange(3, 8).expand(len(specs), -1)
    seen: list[torch.Tensor] = []
    slots = np.repeat(np.array(bank.hold(programs), dtype=np.int32), 5)
    bits = np.repeat(np.array([p.acting for p in programs], dtype=np.uint32), 5)
    plan = steerer.plan(slots, bits)
    # Behind the steerer's own hooks, so that it sees what they made.
    spy = model.model.layers[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        with torch.no_grad(), steerer.acting(plan):
            model(ids, use_cache=False)
    finally:
        spy.remove()
        steerer.detach()
    return seen[0]


def test_order_of_the_spec_is_the_order_of_action(model: PreTrainedModel) -> None:
    """Add then clamp ends at the clamped value, clamp then add does not; mixed with each other in one batch."""
    direction = [1.0] + [0.0] * 31
    add = {"op": "add", "layers": [2], "inline": {"vector": direction}, "strength": 5}
    clamp = {"op": "clamp", "layers": [2], "inline": {"vector": direction, "value": 1.5}}
    out = _last_hidden(model, [[add, clamp], [clamp, add], [add, clamp, add], [clamp, clamp]])[..., 0]
    torch.testing.assert_close(out, torch.tensor([1.5, 6.5, 6.5, 1.5])[:, None].expand(4, 5))


def test_hooks_leave_nothing_behind(model: PreTrainedModel) -> None:
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        _last_hidden(model, [[{"op": "add", "layers": "all", "inline": {"vector": [9.0] * 32}}]])
        assert torch.equal(model(ids, use_cache=False).logits, before)


def test_nothing_acts_outside_of_the_block(model: PreTrainedModel) -> None:
    """A hook that stays attached hands the activation back as it came, also after an error within the block."""
    facts = model_facts(model, model_id="tiny", fingerprint="")
    spec = Intervention.model_validate({"op": "add", "layers": [0], "inline": {"vector": [9.0] * 32}})
    item = compile_program([Resolved(spec)], facts)
    bank = Bank(1, CPU)
    steerer = Steerer(model, bank)
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        plan = steerer.plan(np.full(5, bank.hold([item])[0], dtype=np.int32), np.full(5, item.acting, dtype=np.uint32))
        with steerer.acting(plan):
            assert not torch.allclose(model(ids, use_cache=False).logits, before, atol=1e-2)
        assert torch.equal(model(ids, use_cache=False).logits, before)
        with pytest.raises(ZeroDivisionError), steerer.acting(plan):
            raise ZeroDivisionError
        assert torch.equal(model(ids, use_cache=False).logits, before)
    steerer.detach()


def test_plan_is_made_anew_when_a_slot_changes_hands(model: PreTrainedModel) -> None:
    """Same slots, same bits, other program: the plan of the last step must not be used again."""
    bank = Bank(1, CPU)
    steerer = Steerer(model, bank)
    slots, bits = np.ones(2, dtype=np.int32), np.ones(2, dtype=np.uint32)
    rows = []
    for value in (1.0, 2.0):
        item = program({("resid_post", 0): Row("add", {"delta": torch.full((32,), value)})})
        bank.hold([item])
        (stage,) = steerer.plan(slots, bits)[("resid_post", 0)]
        assert steerer.plan(slots, bits)[("resid_post", 0)][0] is stage, "steady decoding makes no new plan"
        rows.append(stage.pool.tensors["delta"][stage.rows].unique().tolist())
    steerer.detach()
    assert rows == [[1.0], [2.0]]


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            # Views and expanded tensors take no memory.
            if isinstance(item, torch.Tensor) and 0 not in item.stride():
                self.numel = max(self.numel, item.numel())
        return out


WIDE = 64
KEY: tuple[Site, int] = ("resid_post", 0)


def _matrices(rank: int, seed: int) -> Row:
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(rank, WIDE, generator=generator) for _ in range(2))
    return Row("affine", {"up": up, "down": down, "bias": torch.randn(rank, generator=generator)})


@pytest.mark.parametrize("programs", [1, 3])
def test_tokens_that_share_matrices_do_not_copy_them(programs: int) -> None:
    """A matrix of a prompt's tokens is used where it lies, with as many products as there are matrices."""
    tokens, rank, bank = 96, 16, Bank(4, CPU)
    rows = [_matrices(rank, seed) for seed in range(programs)]
    held_by = np.array(bank.hold([program({KEY: row}) for row in rows]), dtype=np.int32)
    slots = np.repeat(held_by, tokens // programs)
    stages = plan_step(bank, slots, np.ones(tokens, dtype=np.uint32))[KEY]
    h = torch.randn(tokens, WIDE, generator=torch.Generator().manual_seed(9))
    with _Largest() as largest:
        found = h
        for stage in stages:
            found = apply_stage(found, stage)
    assert largest.numel <= tokens * WIDE
    expected = torch.stack([
        x + row.tensors["up"].T @ (row.tensors["down"] @ x + row.tensors["bias"])
        for x, row in zip(h, [row for row in rows for _ in range(tokens // programs)], strict=True)])
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("failing_at", [0, 1, 2])
def test_a_program_that_does_not_fit_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, failing_at: int) -> None:
    """The device is full at one of its rows, or when a pool grows."""
    bank = Bank(2, CPU)
    first = numbered(1)
    bank.hold([first])
    rows = program(*(numbered(2.0 + layer, layer).compiled[0].rows for layer in range(3)))
    pool = bank.pools[0]
    acquire, grow, calls = pool.acquire, pool._grow, 0

    def full(row: Row) -> int:
        nonlocal calls
        calls += 1
        if calls == failing_at + 1:
            raise torch.OutOfMemoryError("no room")
        return acquire(row)

    monkeypatch.setattr(pool, "acquire", full)
    with pytest.raises(torch.OutOfMemoryError):
        bank.hold([rows])
    assert pool.num_rows == 1
    assert all((cell.pool[2] == -1).all() for cell in bank.cells.values())
    monkeypatch.setattr(pool, "acquire", acquire)

    def no_room() -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(pool, "_grow", no_room)
    free = pool.num_free
    others = [numbered(10 + n) for n in range(free + 1)]
    with pytest.raises(torch.OutOfMemoryError):
        bank.hold([program(*(item.compiled[0].rows for item in others))])
    assert pool.num_free == free
    monkeypatch.setattr(pool, "_grow", grow)
    assert bank.hold([rows]) == [2] and pool.num_rows == 4
