"""A worker's bookkeeping of steps and faults, and what the scheduler does about them, without vLLM."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from server.engines.vllm.host.taken import Taken
from server.engines.vllm.wire import EXTRA, FAULTS, Fault, Rows
from server.engines.vllm.worker import scheduling
from server.engines.vllm.worker.ops import _carried_out
from server.engines.vllm.worker.stage import poisoned, steered
from server.engines.vllm.worker.steps import Steps
from server.engines.vllm.worker.tables import GraphTables
from server.engines.vllm.worker.tally import MAX_CLOSED
from steering.acting.containment import UNLIMITED, StepLimit, contain
from steering.ops.base import Row

D = 8
KEY, OPAQUE = ("resid_post", 0), ("resid_pre", 1)


def steps_of(limit: StepLimit = UNLIMITED) -> Steps:
    graph = GraphTables(4, num_rows=16, depth=2, rank=2, max_tokens=64, dtype=torch.float32,
                        device=torch.device("cpu"), limit=limit)
    graph.add_place(KEY, D, elementwise=False, columns=slice(0, D))
    return Steps(4, torch.device("cpu"), graph)


def program(digest: str, *strengths: float, key: Any = KEY, limited: bool = True) -> Rows:
    rows = tuple({key: Row("add", {"delta": torch.full((D,), strength)})} for strength in strengths)
    return Rows(digest, rows, (0,) * len(rows), limited)


def params(slot: int, digest: str, prompt: int, length: int, bits: int = 1, start: int = 0, name: str = "n") -> Any:
    touch = {"prompt": prompt, "length": length, "runs": [[start, length, bits, 0]], "rules": [[], []]}
    return SimpleNamespace(extra_args={EXTRA: {"slot": slot, "digest": digest, "touch": touch, "name": name}})


def step(steps: Steps, batch: dict[str, tuple[int, int]], h: torch.Tensor, hidden: torch.Tensor | None = None
         ) -> tuple[torch.Tensor, dict[str, int]]:
    """One forward pass at both places over requests -> (tokens computed before, tokens now)."""
    lengths = [count for _, count in batch.values()]
    starts = np.array([0, *np.cumsum(lengths)], dtype=np.int64)
    steps.begin(list(batch), starts, np.array([before for before, _ in batch.values()], dtype=np.int64),
                int(starts[-1]), lambda: np.zeros(int(starts[-1]), dtype=np.int64))
    place, number = steps.graph.places[KEY], steps.graph.token[:len(h)]
    h, taken = steered(h, place.pool.tensor, place.index[number], place.scalars[number], 2, 2, False, torch.float32,
                       steps.graph.limit)
    steps.note_graph(KEY, taken)
    for key in (KEY, OPAQUE):
        h = _carried_out(steps, h, steps.stages(key), torch.float32)
    steps.collect(h if hidden is None else hidden)
    steps.done()
    readout, steps.readout = steps.readout, None
    return h, steps.tallies.settle(readout)


def test_steps_are_summed_up_per_intervention_and_each_token_once() -> None:
    """A stack in the graph and a program of the opaque op, prompts in chunks, one of them computed again."""
    steps = steps_of()
    assert steps.place(1, program("a", 1.0, 2.0)) and not steps.place(2, program("b", 3.0, key=OPAQUE))
    steps.add("r", params(1, "a", 3, 9, bits=0b11, name="first"))
    steps.add("s", params(2, "b", 2, 9, start=1, name="second"))
    steps.add("u", SimpleNamespace(extra_args=None))
    h = torch.randn(6, D, generator=torch.Generator().manual_seed(0)) * 4
    out, faults = step(steps, {"r": (0, 3), "u": (0, 1), "s": (0, 2)}, h)
    assert not faults and torch.equal(out[3:5], h[3:5])
    one, first = contain(h[:3], h[:3] + 1.0)
    _, second = contain(one, one + 2.0)
    _, third = contain(h[5:], h[5:] + 3.0)
    # r's second and third token come again, and one more.
    step(steps, {"r": (1, 3)}, torch.ones(3, D))
    again = 1.0, 2.0 / 2.0
    found, other, nobody = (Taken.of([answer]) for answer in steps.tallies.take(["first", "second", "u"]))
    assert found.steps[0].count == found.steps[1].count == 4
    assert found.steps[0].total == pytest.approx(float(first.sum()) + again[0], rel=1e-4)
    assert found.steps[1].total == pytest.approx(float(second.sum()) + again[1], rel=1e-4)
    assert found.steps[1].largest == pytest.approx(max(float(second.max()), 1.0), rel=1e-4)
    assert other.steps[0].count == 1 and other.steps[0].largest == pytest.approx(float(third), rel=1e-4)
    assert nobody.steps == {} and nobody.fault is None
    # Once a request is over its sums can be had once.
    steps.drop("r")
    assert Taken.of(steps.tallies.take(["first"])).steps[0].count == 4
    assert steps.tallies.take(["first"]) == [None]


@pytest.mark.parametrize(("key", "place"), [(KEY, "graph"), (OPAQUE, "opaque op")], ids=["graph", "opaque"])
def test_what_is_not_carried_out_is_a_fault_of_its_request_alone(key: Any, place: str) -> None:
    steps = steps_of(StepLimit(50.0))
    steps.place(1, program("a", 1.0, 3e38, key=key))
    steps.place(2, program("b", 1.0, key=key))
    steps.place(3, program("c", 1000.0, key=key))
    for n, (name, slot) in enumerate((("a", 1), ("b", 2), ("c", 3))):
        steps.add(name, params(slot, name, 2, 9, bits=0b11 if name == "a" else 1, start=1 if name == "a" else 0,
                               name=f"name-{n}"))
    h = torch.ones(6, D)
    out, faults = step(steps, {"b": (0, 2), "a": (0, 2), "c": (4, 2)}, h)
    assert faults == {"a": 1, "c": 4} and bool(out.isfinite().all())
    assert torch.equal(out[:2], h[:2] + 1.0) and torch.equal(out[4:], h[4:])
    first, _, third = (Taken.of([answer]).fault for answer in steps.tallies.take(["name-0", "name-1", "name-2"]))
    assert first == Fault("step", 1, 1, *key, math.inf)
    assert third is not None and (third.position, third.intervention) == (4, 0)
    assert third.step == pytest.approx(1000.0, rel=1e-4)
    # It is told once.
    assert step(steps, {"b": (2, 1)}, torch.ones(1, D))[1] == {}


def test_hidden_states_that_are_not_finite_are_a_fault_steered_or_not() -> None:
    steps = steps_of()
    for name in ("plain", "other"):
        steps.add(name, SimpleNamespace(extra_args={EXTRA: {"name": name}}))
    hidden = torch.zeros(5, D)
    hidden[3, 2] = torch.nan
    _, faults = step(steps, {"other": (0, 2), "plain": (7, 3)}, torch.zeros(5, D), hidden)
    assert faults == {"plain": 8}
    assert Taken.of(steps.tallies.take(["plain"])).fault == Fault("behind", 8)


def test_a_request_runs_under_its_own_program_or_not_at_all() -> None:
    steps = steps_of()
    steps.place(1, program("a", 1.0))
    steps.add("right", params(1, "a", 2, 9, name="right"))
    steps.add("wrong", params(1, "b", 2, 9, name="wrong"))
    steps.add("empty", params(3, "a", 2, 9, name="empty"))
    h = torch.ones(6, D)
    out, faults = step(steps, {"right": (0, 2), "wrong": (0, 2), "empty": (0, 2)}, h)
    assert faults == {"wrong": 0, "empty": 0}
    assert torch.equal(out[:2], h[:2] + 1) and torch.equal(out[2:], h[2:]), "nothing is done to the others"
    # The slot is given away while a request is still there: it stops being steered and is ended.
    steps.place(1, program("c", 5.0))
    out, faults = step(steps, {"right": (2, 1)}, torch.ones(1, D))
    assert faults == {"right": 0} and torch.equal(out, torch.ones(1, D))
    assert Taken.of(steps.tallies.take(["right"])).fault == Fault("program", 0)
    # The same program again is no reason.
    steps.add("late", params(1, "c", 2, 9, name="late"))
    steps.place(1, program("c", 5.0))
    assert step(steps, {"late": (0, 1)}, torch.ones(1, D))[1] == {}


def test_programs_of_the_servers_own_are_not_held_to_the_limit() -> None:
    """Beside one that is, in the same step and at the same place."""
    steps = steps_of(StepLimit(2.0))
    assert not steps.place(1, program("a-unlimited", 9.0, limited=False))
    assert not steps.place(2, program("b", 9.0, key=OPAQUE))
    steps.place(3, program("c-unlimited", 9.0, key=OPAQUE, limited=False))
    for slot, digest in ((1, "a-unlimited"), (2, "b"), (3, "c-unlimited")):
        steps.add(digest, params(slot, digest, 1, 9, name=digest))
    out, faults = step(steps, {"a-unlimited": (0, 1), "b": (0, 1), "c-unlimited": (0, 1)}, torch.ones(3, D))
    assert faults == {"b": 0}
    assert out[:, 0].tolist() == [10.0, 1.0, 10.0]


def test_memory_of_requests_that_nobody_asks_about_is_bounded() -> None:
    steps = steps_of()
    for n in range(MAX_CLOSED + 50):
        steps.tallies.open(f"r{n}", f"n{n}")
        steps.tallies.blame(f"r{n}", Fault("behind", 0))
        steps.tallies.close(f"r{n}")
    assert steps.tallies.take(["n0", f"n{MAX_CLOSED + 49}"])[0] is None
    assert len(steps.tallies._closed) <= MAX_CLOSED and len(steps.tallies._row_of) == 0


def test_a_rank_that_is_not_heard_poisons_what_it_refused_and_nothing_else() -> None:
    x = torch.ones(4, D)
    taken = torch.tensor([[0.0, 1.0], [math.inf, 0.0], [0.0, 60.0], [math.nan, 0.0]])
    found = poisoned(x, taken, StepLimit(50.0))
    assert found.isnan().all(-1).tolist() == [False, True, True, False]
    assert poisoned(x, taken, StepLimit(50.0, "clip")).isnan().all(-1).tolist() == [False, True, False, False]
    assert torch.equal(found[[0, 3]], x[[0, 3]])


class Manager:
    """As much of vLLM's cache as is touched."""

    def __init__(self, blocks: dict[str, list[int]]) -> None:
        self.blocks = blocks
        self.evicted: set[int] = set()

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return (self.blocks[request_id],)

    def evict_blocks(self, blocks: set[int]) -> None:
        self.evicted |= blocks


class Scheduler:
    def __init__(self, blocks: dict[str, list[int]]) -> None:
        self.kv_cache_manager = Manager(blocks)
        self.cache_config = SimpleNamespace(block_size=32)
        self.running: list[Any] = []
        self.waiting: list[Any] = []
        self.requests = {name: SimpleNamespace(is_finished=lambda: False) for name in blocks}
        self.grammar_compile_error_reqs: set[str] = set()
        self.given: list[tuple[dict[str, list[int]], list[list[int]]]] = []

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
        return "updated"

    def schedule(self, new: dict[str, list[int]], more: list[list[int] | None]) -> Any:
        return SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(block_ids=(blocks,)) for blocks in new.values()],
            scheduled_cached_reqs=SimpleNamespace(new_block_ids=[None if part is None else (part,) for part in more]),
            new_block_ids_to_zero=None)


def test_faulty_requests_and_those_that_share_their_blocks_end_and_leave_nothing() -> None:
    scheduling.wrap(Scheduler)
    scheduling.wrap(Scheduler)
    scheduler = Scheduler({"faulty": [1, 2, 3], "sharing": [1, 2, 9], "prefix": [1, 7], "other": [4, 5]})
    output = SimpleNamespace(req_id_to_index={"faulty": 0, "prefix": 1, "other": 2, "sharing": 3},
                             sampled_token_ids=[[10], [11], [12], [13]], **{FAULTS: {"faulty": 40, "gone": 3}})
    assert scheduler.update_from_output(None, output) == "updated"
    # Position 40 is in the second block: the first is as good as ever.
    assert scheduler.kv_cache_manager.evicted == {2, 3}
    assert scheduler.grammar_compile_error_reqs == {"faulty", "sharing"}
    assert output.sampled_token_ids == [[], [11], [12], []]
    # Their blocks are zeroed when somebody else gets them, once.
    assert scheduler.schedule({"new": [8, 3]}, [None, [6]]).new_block_ids_to_zero == [3]
    assert scheduler.schedule({"new": [3]}, [[2]]).new_block_ids_to_zero == [2]
    assert scheduler.schedule({"new": [3]}, [[2]]).new_block_ids_to_zero is None
    assert scheduler.update_from_output(None, SimpleNamespace(sampled_token_ids=[])) == "updated"
