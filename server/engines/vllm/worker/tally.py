"""What the interventions of a worker's steps did, per request: read from the device once a step, behind it.

A step's relative steps and whether its final hidden states are finite are gathered on the device and copied to the
host while vLLM samples; they are summed up when its tokens are handed on. What was not carried out, or led to values
that are not finite, is a fault of its request, which vLLM's scheduler ends before a token of that step is told.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from server.engines.measured import Measured, MeasuredTable
from server.engines.vllm.wire import Fault
from server.engines.vllm.worker.readout import Entry, Readout, Sheet
from steering.acting.containment import UNLIMITED, StepLimit

IntArray = npt.NDArray[np.int64]
# Finished requests whose steps are kept until somebody asks for them.
MAX_CLOSED = 4096
MAX_PENDING = 8
NO_ROW = -1


class Tallies:
    """Of all requests in a worker. Steps are begun by the worker's thread; they may be settled by another one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table = MeasuredTable(64)
        self._known = np.zeros(64, dtype=np.int64)
        self._free = list(range(63, -1, -1))
        self._row_of: dict[str, int] = {}
        self._name_of: dict[str, str] = {}
        self._request_of: dict[str, str] = {}
        self._faults: dict[str, Fault] = {}
        self._closed: OrderedDict[str, tuple[Measured, Fault | None]] = OrderedDict()
        self._news: dict[str, int] = {}
        self._pending: deque[Readout] = deque()

    def open(self, request_id: str, name: str) -> None:
        """A request comes, or comes back, under the name by which it is asked for."""
        with self._lock:
            self._name_of[request_id] = name
            self._request_of[name] = request_id
            if request_id in self._row_of:
                return
            if not self._free:
                size = len(self._known)
                self._table.grow()
                self._known = np.concatenate([self._known, np.zeros_like(self._known)])
                self._free = list(range(2 * size - 1, size - 1, -1))
            row = self._free.pop()
            self._table.reset(row)
            self._known[row] = 0
            self._row_of[request_id] = row

    def close(self, request_id: str) -> None:
        """A request is over. What it did is kept until somebody asks."""
        with self._lock:
            row = self._row_of.pop(request_id, None)
            if row is None:
                return
            name = self._name_of.pop(request_id)
            self._request_of.pop(name, None)
            self._news.pop(request_id, None)
            measured, fault = self._table.of(row), self._faults.pop(request_id, None)
            self._free.append(row)
            if fault is not None or measured.count.any():
                self._closed[name] = (measured, fault)
            while len(self._closed) > MAX_CLOSED:
                self._closed.popitem(last=False)

    def blame(self, request_id: str, fault: Fault) -> None:
        """The first fault of a request counts."""
        with self._lock:
            self._blame(request_id, fault)

    def add(self, readout: Readout) -> None:
        with self._lock:
            self._pending.append(readout)
            while len(self._pending) > MAX_PENDING:
                # Nobody waits for the outputs of some ranks, so their steps are summed up here.
                self._settle(self._pending.popleft())

    def settle(self, until: Readout | None = None) -> dict[str, int]:
        """Sum up steps up to `until`, or all, and hand out the new faults: request -> position."""
        with self._lock:
            while self._pending:
                readout = self._pending.popleft()
                self._settle(readout)
                if readout is until:
                    break
            news, self._news = self._news, {}
            return news

    def take(self, names: Sequence[str]) -> list[dict[str, Any] | None]:
        """What requests did, by name; those that are over are forgotten."""
        self.settle_all()
        with self._lock:
            return [self._taken(name) for name in names]

    def settle_all(self) -> None:
        """Like `settle`, leaving the new faults for whoever settles next."""
        news = self.settle()
        with self._lock:
            self._news = news | self._news

    def _taken(self, name: str) -> dict[str, Any] | None:
        if name in self._closed:
            measured, fault = self._closed.pop(name)
        elif name in self._request_of:
            request_id = self._request_of[name]
            measured, fault = self._table.of(self._row_of[request_id]), self._faults.get(request_id)
        else:
            return None
        used = np.flatnonzero(measured.count)
        return {"fault": None if fault is None else asdict(fault),
                "steps": [[int(j), float(measured.largest[j]), float(measured.total[j]), int(measured.count[j]),
                           int(measured.clipped[j])] for j in used]}

    def _settle(self, readout: Readout) -> None:
        values, sheet, done = readout.read(), readout.sheet, 0
        # Requests that have left meanwhile have no row any more.
        rows = np.array([self._row_of.get(request_id, NO_ROW) for request_id in sheet.request_ids], dtype=np.int64)
        by_limit: dict[StepLimit, list[tuple[Entry, npt.NDArray[np.float32]]]] = {}
        for entry in readout.entries:
            size = entry.interventions.size
            by_limit.setdefault(entry.limit, []).append((entry, values[done:done + size]))
            done += size
        for limit, entries in by_limit.items():
            self._sum_up(sheet, rows, entries, limit)
        finite = values[done:done + readout.checked]
        if not finite.all():
            tokens = np.flatnonzero(finite == 0)
            owners = sheet.owners(tokens)
            for owner, position in zip(owners.tolist(), sheet.positions(tokens, owners).tolist(), strict=True):
                self._blame(sheet.request_ids[owner], Fault("behind", position))
        mine = rows != NO_ROW
        ends = sheet.computed + np.diff(sheet.starts)
        self._known[rows[mine]] = np.maximum(self._known[rows[mine]], ends[mine])

    def _sum_up(self, sheet: Sheet, row_of: IntArray, entries: Sequence[tuple[Entry, npt.NDArray[np.float32]]],
                limit: StepLimit) -> None:
        """Steps of several places at once: a model has many layers, and a call costs more than its few numbers."""
        interventions = np.concatenate([entry.interventions.reshape(-1) for entry, _ in entries])
        acting = np.flatnonzero(interventions >= 0)
        found = np.concatenate([steps for _, steps in entries])[acting]
        chosen = interventions[acting].astype(np.int64)
        tokens = np.concatenate([np.repeat(entry.tokens, entry.interventions.size // max(len(entry.tokens), 1))
                                 for entry, _ in entries])[acting]
        owners = sheet.owners(tokens)
        rows, positions = row_of[owners], sheet.positions(tokens, owners)
        new = rows != NO_ROW
        # Tokens that are computed again after a request was thrown out count once.
        new[new] = positions[new] >= self._known[rows[new]]
        self._table.add(rows[new], chosen[new], found[new], limit)
        wrong = np.isposinf(found)
        if limit.action == "refuse" and limit != UNLIMITED:
            wrong |= found > limit.largest
        if not wrong.any():
            return
        places = np.repeat(np.arange(len(entries)), [entry.interventions.size for entry, _ in entries])[acting]
        for i in np.flatnonzero(wrong).tolist():
            site, layer = entries[places[i]][0].key
            self._blame(sheet.request_ids[owners[i]],
                        Fault("step", int(positions[i]), int(chosen[i]), site, layer, float(found[i])))

    def _blame(self, request_id: str, fault: Fault) -> None:
        if request_id not in self._faults and request_id in self._row_of:
            self._faults[request_id] = fault
            self._news[request_id] = fault.position
