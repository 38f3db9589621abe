"""What a worker knows of its requests and programs, and what each of its steps must do and keep.

Everything here runs in the worker's thread, driven by what vLLM's scheduler hands to the model runner, so all ranks
of a tensor-parallel group agree without talking to each other.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from server.engines.arena import Arena
from server.engines.vllm.wire import Fault, Key, Rows, carried_by, touch_of
from server.engines.vllm.worker.graph_rows import GraphRows
from server.engines.vllm.worker.passengers import Passenger, Stretch
from server.engines.vllm.worker.readout import Entry, Readout, Sheet
from server.engines.vllm.worker.shelf import Shelf
from server.engines.vllm.worker.tables import GraphTables
from server.engines.vllm.worker.tally import Tallies
from steering.acting.containment import UNLIMITED, StepLimit
from steering.programs.touch import Touch
from steering.residency.plan import Stage, StepPlan, plan_step
from steering.residency.row_table import RowTable

IntArray = npt.NDArray[np.int64]


class Steps:
    """Programs, requests and the plan of the step at hand."""

    def __init__(self, num_slots: int, device: torch.device, graph: GraphTables, kept_bytes: int = 0) -> None:
        # By whether the limit on relative steps holds for a program.
        self.tables = {limited: RowTable(num_slots, device) for limited in (True, False)}
        self.graph = graph
        self.tallies = Tallies()
        self.plan: StepPlan = {}
        self.stretches: list[Stretch] = []
        self._wanted: set[Key] = set()
        self.shelf = Shelf(kept_bytes)
        self.num_steps = 0
        self.readout: Readout | None = None
        self.spellings: list[str] = []
        self._device = device
        self._limited: dict[int, bool] = {}
        self._digests: dict[int, str] = {}
        self._in_graph: set[int] = set()
        self._passengers: dict[str, Passenger] = {}
        self._arena = Arena()
        self._batch: list[str] = []
        self._stale = True
        self._slots: IntArray = np.zeros(0, dtype=np.int64)
        self._bases: IntArray = np.zeros(0, dtype=np.int64)
        self._ruled: list[int] = []
        self._watching: list[int] = []
        self._opaque = False
        self._last: tuple[int, int, bytes, bytes] | None = None
        self._last_plan: StepPlan = {}
        self._sheet: Sheet | None = None
        self._entries: list[Entry] = []
        self._graph_rows = GraphRows(graph)

    # Programs, placed by the server process.

    def place(self, slot: int, rows: Rows) -> bool:
        """Put a program into a slot, in the place of what was there. True if the graph carries it out."""
        for request_id, passenger in self._passengers.items():
            if passenger.slot == slot and passenger.touch is not None and passenger.digest != rows.digest:
                # No request should be left there. One that is must not go on under another program.
                self._disown(request_id, passenger)
        for table in self.tables.values():
            table.clear(slot)
        self._in_graph.discard(slot)
        self.graph.clear(slot)
        self._digests[slot], self._limited[slot] = rows.digest, rows.limited
        if self.graph.place(slot, rows):
            self._in_graph.add(slot)
            return True
        self.tables[rows.limited].place(slot, rows.rows)
        return False

    def holds(self, slot: int) -> str | None:
        """Digest of the program in a slot."""
        return self._digests.get(slot)

    def _disown(self, request_id: str, passenger: Passenger) -> None:
        """A request whose slot holds another program is ended, and nothing is done to it until then."""
        self.tallies.blame(request_id, Fault("program", 0))
        passenger.slot, passenger.in_graph, self._stale = 0, False, True

    # Requests, as the scheduler brings and ends them.

    def add(self, request_id: str, sampling: Any) -> None:
        """Read what the request carries. A request that is there already (streamed input, resumption) is replaced."""
        extra = carried_by(sampling)
        self._forget(request_id)
        self.tallies.open(request_id, extra.get("name", request_id))
        if not extra.keys() & {"touch", "keep", "capture"}:
            return
        touch = touch_of(extra, self._spelling) if "touch" in extra else None
        slot = int(extra.get("slot", 0))
        passenger = Passenger(slot, 0, touch, extra.get("digest"), in_graph=slot in self._in_graph)
        told = touch is None or touch.sections is None or bool(self.spellings)
        if touch is not None and (self._digests.get(slot) != passenger.digest or not told):
            self._disown(request_id, passenger)
        if touch is not None:
            on, off = touch.on, touch.off
            if passenger.in_graph and not touch.ruled:
                # Known beforehand: which row of the graph's index each position reads.
                on, off = self.graph.variants(slot, on & ~off), np.zeros_like(off)
            passenger.base = self._arena.put(on, off)
        if "keep" in extra:
            passenger.keep, passenger.keep_from = extra["keep"]["tag"], int(extra["keep"]["from"])
            if extra["keep"].get("bounded"):
                self.shelf.hold(extra["keep"]["tag"])
        if "capture" in extra:
            wanted = extra["capture"]["positions"]
            passenger.capture = extra["capture"]["tag"]
            passenger.keys = frozenset((site, int(layer)) for site, layer in extra["capture"]["keys"])
            passenger.positions = None if wanted is None else np.asarray(wanted, dtype=np.int64)
        self._passengers[request_id] = passenger
        self._stale = True

    def drop(self, request_id: str) -> None:
        """A request is over."""
        self.tallies.close(request_id)
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        passenger = self._passengers.pop(request_id, None)
        if passenger is not None and passenger.touch is not None:
            self._arena.drop(passenger.base, len(passenger.touch.on))
        self._stale = True

    # Steps.

    def begin(self, request_ids: Sequence[str], starts: IntArray, computed: IntArray, num_tokens: int,
              token_ids: Callable[[], npt.NDArray[np.int64]],
              tokens_of: Callable[[int, int, int], Sequence[int]] = lambda row, start, stop: ()) -> None:
        """What the coming forward pass must do.

        Args:
            request_ids: requests of the batch, in order.
            starts: first row of each request in the flat batch, and the end, `[R + 1]`.
            computed: tokens of each request that were computed before, `[R]`.
            token_ids: ids of the flat batch; asked for only by rules on generated tokens.
            tokens_of: ids of the request in a row of the batch, from one position to another; asked for only by rules
                on sections where tokens were computed in another step than this request's own.
        """
        self.num_steps += 1
        if self._stale or self._batch != request_ids:
            self._read_batch(request_ids)
        self.stretches, self._wanted = [], set()
        self._entries = []
        self._graph_rows.clear()
        self._sheet = Sheet(self._batch, starts, computed)
        if not self._passengers:
            self._idle()
            return
        lengths = starts[1:] - starts[:-1]
        self.stretches = [Stretch(self._passengers[self._batch[i]], int(starts[i]), int(starts[i + 1]),
                                  int(computed[i])) for i in self._watching]
        self._wanted = set().union(*(stretch.passenger.keys for stretch in self.stretches))
        if not self._slots.any():
            self._idle()
            return
        # index[t] = base of t's request + its position, in one pass over the flat batch.
        slots = np.repeat(self._slots, lengths)
        index = np.repeat(self._bases + computed - starts[:-1], lengths)
        index += np.arange(num_tokens)
        index[slots == 0] = 0
        on = self._arena.on[index]
        if not self._opaque and not self._ruled:
            self._fill(np.where(slots == 0, 0, on) if (self._slots == 0).any() else on)
            self.plan = {}
            return
        bits = on & ~self._arena.off[index]
        for i in self._ruled:
            passenger = self._passengers[self._batch[i]]
            assert passenger.touch is not None
            part = slice(int(starts[i]), int(starts[i + 1]))
            self._catch_up(passenger.touch, int(computed[i]), partial(tokens_of, i))
            positions = np.arange(computed[i], computed[i] + lengths[i])
            bits[part] = passenger.touch.bits(positions, token_ids()[part])
        opaque = np.repeat(self._opaque_rows, lengths)
        self._fill_mixed(slots, bits, opaque)

    def _catch_up(self, touch: Touch, computed: int, tokens_of: Callable[[int, int], Sequence[int]]) -> None:
        """Read tokens that this request never ran: after it was set back another one had put them in the cache."""
        sections = touch.sections
        if sections is None or computed <= touch.prompt_length + sections.known:
            return
        start = sections.known
        for n, token in enumerate(tokens_of(touch.prompt_length + start, computed)):
            sections.of(start + n, int(token))

    def _spelling(self, token: int) -> str:
        return self.spellings[token] if token < len(self.spellings) else ""

    def _fill_mixed(self, slots: IntArray, bits: npt.NDArray[np.uint32], opaque: npt.NDArray[np.bool_]) -> None:
        graph_rows = np.where(opaque | (slots == 0), 0, bits)
        for i in self._ruled:
            slot = int(self._slots[i])
            if slot in self._in_graph:
                mine = slots == slot
                graph_rows[mine] = self.graph.variants(slot, bits[mine])
        self._fill(graph_rows.astype(np.uint32))
        mine = np.where(opaque, slots, 0).astype(np.int32)
        state = (self.tables[True].version, self.tables[False].version, mine.tobytes(), bits.tobytes())
        if state != self._last:
            self._last, self._last_plan = state, self._planned(mine, bits)
        self.plan = self._last_plan

    def _planned(self, slots: npt.NDArray[np.int32], bits: npt.NDArray[np.uint32]) -> StepPlan:
        plan = plan_step(self.tables[True], slots, bits)
        if self.tables[False].pools:
            for key, stages in plan_step(self.tables[False], slots, bits).items():
                # These act on other tokens than the stages before, so the order among them does not matter.
                plan.setdefault(key, []).extend(stages)
        return plan

    def _fill(self, numbers: npt.NDArray[np.uint32]) -> None:
        self.graph.fill(numbers)
        self._graph_rows.set(numbers)

    def _read_batch(self, request_ids: Sequence[str]) -> None:
        self._batch = list(request_ids)
        aboard = [self._passengers.get(request_id) for request_id in self._batch]
        self._slots = np.array([0 if p is None or p.touch is None else p.slot for p in aboard], dtype=np.int64)
        self._bases = np.array([0 if p is None else p.base for p in aboard], dtype=np.int64)
        self._opaque_rows = np.array([p is not None and not p.in_graph for p in aboard], dtype=np.bool_)
        self._opaque = bool((self._opaque_rows & (self._slots > 0)).any())
        self._ruled = [i for i, p in enumerate(aboard) if p is not None and p.touch is not None and p.touch.ruled]
        self._watching = [i for i, p in enumerate(aboard) if p is not None and (p.keep or p.capture)]
        self._stale = False

    def _idle(self) -> None:
        self.plan = {}
        self.graph.idle()

    @property
    def busy(self) -> bool:
        """Whether any opaque op has something to do in this step."""
        return bool(self.plan) or bool(self.stretches) or bool(self._graph_rows)

    def stages(self, key: Key) -> list[Stage]:
        return self.plan.get(key, [])

    def limit_of(self, stage: Stage) -> StepLimit:
        free = self.tables[False].pools
        return UNLIMITED if free and any(stage.pool is pool for pool in free) else self.graph.limit

    def note(self, stage: Stage, taken: torch.Tensor) -> None:
        """Steps `[n]` that a stage of the opaque op took."""
        assert stage.key is not None
        tokens = np.arange(len(stage.rows)) if stage.positions is None else stage.positions
        self._entries.append(Entry(stage.key, tokens, np.full(len(tokens), stage.intervention, dtype=np.int8), taken,
                                   self.limit_of(stage)))

    def note_graph(self, key: Key, taken: torch.Tensor) -> None:
        """Steps `[T, stages]` that the graph took at a place, of all tokens."""
        entry = self._graph_rows.entry(key, taken)
        if entry is not None:
            self._entries.append(entry)

    def capture(self, key: Key, activation: torch.Tensor) -> None:
        """Copy the wanted rows of an activation `[T, width]` as it stands."""
        for stretch in self.stretches:
            passenger = stretch.passenger
            if passenger.capture is None or key not in passenger.keys:
                continue
            positions, rows = stretch.rows(passenger.positions, passenger.keep_from)
            if len(rows):
                self.shelf.capture(passenger.capture, key, positions, activation[torch.from_numpy(rows)].float().cpu())

    def wants(self, key: Key) -> bool:
        return key in self._wanted

    def collect(self, hidden: torch.Tensor | None) -> None:
        """What this step did is on its way to the host. hidden: final hidden states, where this worker has them."""
        sheet, self._sheet = self._sheet, None
        if sheet is not None and sheet.request_ids:
            total = int(sheet.starts[-1])
            self.readout = Readout.take(sheet, self._entries, None if hidden is None else hidden[:total])
            self.tallies.add(self.readout)
        self._entries = []

    def done(self) -> None:
        """The forward pass is over. A pass that vLLM makes by itself, to keep replicas in step, finds nothing to do."""
        self.plan = {}
        self.stretches, self._wanted = [], set()
        self._graph_rows.clear()

    def end(self, hidden: torch.Tensor) -> None:
        """Keep final hidden states `[T, d_model]` of the requests that asked for them."""
        for stretch in self.stretches:
            if stretch.passenger.keep is not None:
                positions, rows = stretch.rows(None, stretch.passenger.keep_from)
                if len(rows):
                    self.shelf.keep(stretch.passenger.keep, positions,
                                    hidden[torch.from_numpy(rows).to(hidden.device)])
