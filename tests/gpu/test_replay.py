"""The graph's tables under replay: programs change between replays, addresses do not; every kernel on the device."""

import numpy as np
import pytest
import torch

from server.engines.vllm.wire import Rows
from server.engines.vllm.worker.stage import steered
from server.engines.vllm.worker.tables import GraphTables
from steering.acting.containment import UNLIMITED, StepLimit, contain
from steering.acting.steerer import measured_stage
from steering.artifacts.source import Resolved
from steering.language.intervention import Intervention
from steering.models.describe import model_facts
from steering.ops.base import Row
from steering.ops.kernel import get_kernel
from steering.programs.compiler import compile_program
from steering.residency.bank import Bank
from steering.residency.plan import plan_step
from tests.engines.cases import dense_cases
from tests.engines.vllm.test_graph import MAKERS, D
from tests.gpu.conftest import Replayed
from tests.tiny import tiny

KEY = ("resid_post", 0)
SLOTS, TOKENS, RANK, DEPTH = 3, 24, 4, 2


def tables_on(device: torch.device, limit: StepLimit) -> GraphTables:
    tables = GraphTables(SLOTS, num_rows=64, depth=DEPTH, rank=RANK, max_tokens=TOKENS + 8, dtype=torch.float32,
                         device=device, limit=limit)
    tables.add_place(KEY, D, elementwise=False, columns=slice(0, D))
    return tables


@pytest.mark.parametrize("limit", [UNLIMITED, StepLimit(1.0), StepLimit(1.0, "clip")], ids=str)
def test_programs_change_between_replays(device: torch.device, limit: StepLimit) -> None:
    """80 steps: programs come and go in three slots, batches differ in length and in who is where; each replay equals
    the kernels one after another, contained, and untouched tokens stay bit for bit."""
    tables = tables_on(device, limit)
    place = tables.places[KEY]
    h = torch.zeros(TOKENS, D, device=device)

    def work() -> torch.Tensor:
        number = tables.token[:TOKENS]
        y, taken = steered(h, place.pool.tensor, place.index[number], place.scalars[number], DEPTH, RANK, False,
                           torch.float32, limit)
        return torch.cat([y, taken], dim=-1)

    graph = Replayed(work, device)
    random = np.random.default_rng(0)
    names = list(MAKERS)
    held: dict[int, list[Row]] = {}
    touched_before = 0
    for step in range(80):
        if len(held) < SLOTS or random.random() < 0.4:
            slot = 1 + int(random.integers(SLOTS))
            rows = [MAKERS[names[int(random.integers(len(names)))]](int(random.integers(50)) + 1)
                    for _ in range(1 + int(random.integers(DEPTH)))]
            tables.clear(slot)
            assert tables.place(slot, Rows(f"{step}", tuple({KEY: row} for row in rows), (0,) * len(rows)))
            held[slot] = rows
        count = 1 + int(random.integers(TOKENS))
        slots = random.integers(0, SLOTS + 1, count)
        slots[[slot not in held for slot in slots]] = 0
        numbers = np.zeros(count, dtype=np.uint32)
        for slot, rows in held.items():
            mine = slots == slot
            numbers[mine] = tables.variants(slot, np.full(mine.sum(), 2**len(rows) - 1, dtype=np.uint32))
        activations = torch.from_numpy(random.standard_normal((TOKENS, D)).astype(np.float32))
        tables.fill(numbers)
        h.copy_(activations)
        found = graph.replay().cpu()
        untouched = np.concatenate([slots == 0, np.ones(TOKENS - count, dtype=bool)])
        assert torch.equal(found[untouched, :D], activations[untouched])
        for token in np.flatnonzero(~untouched):
            expected, steps = activations[token:token + 1], []
            for row in held[int(slots[token])]:
                after = get_kernel(row.kernel)(expected, {name: t.unsqueeze(0) for name, t in row.tensors.items()})
                expected, taken = contain(expected, after, limit)
                steps.append(float(taken))
            assert torch.allclose(found[token:token + 1, :D], expected, atol=2e-3, rtol=2e-3), (step, token)
            assert found[token, D:D + len(steps)].tolist() == pytest.approx(steps, rel=2e-3, abs=1e-4)
        touched_before += int((~untouched).sum())
    assert touched_before > 200, "the test steers next to nothing"


def test_every_kernel_gives_on_the_device_what_it_gives_on_the_cpu(device: torch.device) -> None:
    """All dense ops through the bank, in a mixed batch, planned and carried out as the opaque op does."""
    facts = model_facts(tiny("qwen3"), model_id="tiny", fingerprint="0" * 64)
    cases = dense_cases(facts.d_model, facts.d_ff, facts.num_heads, facts.head_dim, facts.num_layers)
    programs = [compile_program([Resolved(Intervention.model_validate(item)) for item in spec], facts)
                for spec, _ in cases]
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for where in ("cpu", str(device)):
        bank = Bank(len(programs), torch.device(where))
        slots = np.array(bank.hold(programs) * 3 + [0], dtype=np.int32)
        plan = plan_step(bank, slots, np.full(len(slots), 2**32 - 1, dtype=np.uint32))
        generator = torch.Generator().manual_seed(1)
        found[where] = []
        for key in sorted(plan):
            h = torch.randn(len(slots), facts.width(key[0]), generator=generator).to(where)
            for stage in plan[key]:
                h, taken = measured_stage(h, stage, UNLIMITED)
                found[where].append((h.cpu(), taken.cpu()))
    assert len(found["cpu"]) > 10
    for (expected, steps), (h, taken) in zip(found["cpu"], found[str(device)], strict=True):
        assert torch.allclose(h, expected, atol=1e-3, rtol=1e-3)
        assert torch.allclose(taken, steps, atol=1e-3, rtol=1e-3, equal_nan=True)
