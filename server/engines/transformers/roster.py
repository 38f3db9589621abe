"""The completions that the embedded engine runs, with what each holds and has done so far."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from transformers.generation.continuous_batching.requests import FutureRequestState

from server.engines.arena import Arena
from server.engines.data import Touched
from server.engines.guests import Share
from server.engines.keeping import KeptRows
from server.engines.measured import Indices, MeasuredTable
from server.engines.transformers.handover import on_loop
from server.engines.transformers.running import EngineCompletion, Failure, Running
from steering.acting.containment import StepLimit
from steering.acting.record import Taken
from steering.language.errors import InvalidRequest

Bits = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Batch:
    """Requests of a step in the order of its flat batch: their rows in the table, tokens before and tokens in it.

    known: tokens that had been run already, more than come before it where a request is computed again.
    """

    request_ids: list[str]
    rows: Indices
    offsets: Indices
    lengths: Indices
    known: Indices

    @cached_property
    def owners(self) -> Indices:
        """Index of the request that each token of the flat batch belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def positions(self) -> Indices:
        """Position of each token of the flat batch in its request."""
        shift = self.offsets - (np.cumsum(self.lengths) - self.lengths)
        return np.arange(len(self.owners)) + shift[self.owners]

    def place(self, token: int) -> tuple[int, int]:
        """Request and position in it of a token of the flat batch."""
        return int(self.owners[token]), int(self.positions[token])


NOBODY = Batch([], *(np.zeros(0, dtype=np.int64),) * 4)


class Roster:
    """Running completions. `on_retired` is called from the engine's thread.

    A completion is known here from its admission (`add`, with its slot pinned) until the engine has let go of it
    (`retire`). In between it may be asked to leave (`leave`, from the event loop; `fail`, from the engine's thread):
    the engine's thread drops it before its next step, and until then its rows stay its own.

    lock: is held while what is known of a completion changes.
    leaving: completions that nobody reads any more. given_up: of those, the ones that were told of a failure.
    keeping: what is kept of each completion that is to be measured.
    share: of the guests among the completions.
    companions: the weak runs of completions, by their own names.
    """

    def __init__(self, on_retired: Callable[[Running], None]) -> None:
        self.completions: dict[str, EngineCompletion] = {}
        self.companions: dict[str, Running] = {}
        self.keeping: dict[str, KeptRows] = {}
        self.leaving: set[str] = set()
        self.given_up: set[str] = set()
        self.lock = threading.Lock()
        self._on_retired = on_retired
        self._hosts = 0
        self.share = Share(lambda: self._hosts > 0)
        self._arena = Arena()
        # One row per running completion: slot, where its bits begin, tokens processed.
        self._row_of: dict[str, int] = {}
        self._table = np.zeros((64, 3), dtype=np.int64)
        self._measured = MeasuredTable(64)
        self._free_rows = list(range(63, -1, -1))
        self._num_steered = 0

    def add(self, completion: EngineCompletion) -> None:
        """Raises InvalidRequest if there is one of that name."""
        running = completion.running
        with self.lock:
            if running.request_id in self.completions:
                raise InvalidRequest(f"request id {running.request_id} is in use", param="request_id")
            for run in running.runs:
                self._enter(run)
            if running.weak is not None:
                self.companions[running.weak.request_id] = running.weak
            if (kept := completion.kept()) is not None:
                self.keeping[running.request_id] = kept
            self.completions[running.request_id] = completion
            self._hosts += not running.generation.guest

    def _enter(self, running: Running) -> None:
        if running.touch is not None:
            running.base = self._arena.put(running.touch.on, running.touch.off)
            self._num_steered += 1
        if not self._free_rows:
            size = len(self._table)
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._measured.grow()
            self._free_rows = list(range(2 * size - 1, size - 1, -1))
        row = self._free_rows.pop()
        self._table[row] = (running.slot, running.base, 0)
        self._measured.reset(row)
        self._row_of[running.request_id] = row

    def running(self, request_id: str) -> Running | None:
        """The completion or the companion of this name."""
        completion = self.completions.get(request_id)
        return self.companions.get(request_id) if completion is None else completion.running

    def open(self, request_id: str) -> EngineCompletion | None:
        """The completion, if somebody still reads it."""
        with self.lock:
            return None if request_id in self.leaving else self.completions.get(request_id)

    def leave(self, running: Running) -> bool:
        """Have a completion dropped before the next step. False if it is not known here."""
        with self.lock:
            found = self.completions.get(running.request_id)
            if found is None or found.running is not running:
                return False
            self.leaving.add(running.request_id)
            return True

    def fail(self, request_id: str, failure: Failure) -> None:
        """End one completion of the step that is under way; called from the engine's thread. Its reader gets `failure`,
        the step's token is dropped, none of its pages are shared."""
        completion = self.open(request_id)
        if completion is not None and self.leave(completion.running):
            self.given_up.add(request_id)
            with self.lock:
                for run in completion.running.runs:
                    run.measured = self._measured.of(self._row_of[run.request_id])
            on_loop(completion.loop, completion.fail, failure)

    def retire(self, request_id: str) -> None:
        """Forget a completion and free what it holds. Does nothing for one that is gone already."""
        with self.lock:
            completion = self.completions.pop(request_id, None)
            self.leaving.discard(request_id)
            self.given_up.discard(request_id)
            if completion is None:
                return
            if (kept := self.keeping.pop(request_id, None)) is not None:
                kept.settle()
            running = completion.running
            self._hosts -= not running.generation.guest
            for run in running.runs:
                self._exit(run)
            if running.weak is not None:
                del self.companions[running.weak.request_id]
        self._on_retired(running)

    def _exit(self, running: Running) -> None:
        row = self._row_of.pop(running.request_id)
        running.processed = int(self._table[row, 2])
        running.measured = self._measured.of(row)
        self._free_rows.append(row)
        if running.touch is not None:
            self._arena.drop(running.base, len(running.touch.on))
            self._num_steered -= 1

    def touched(self, running: Running) -> list[Touched]:
        """What its interventions acted on among the tokens that went through the model, and how far they moved them."""
        with self.lock:
            row = self._row_of.get(running.request_id)
            if row is None:
                return running.touched(running.processed, running.measured)
            processed, measured = int(self._table[row, 2]), self._measured.of(row)
        return running.touched(processed, measured)

    def is_guest(self, request_id: str) -> bool:
        completion = self.completions.get(request_id)
        return completion is not None and completion.running.generation.guest

    # What a step reads of them and leaves with them, called from the engine's thread.

    def batch_of(self, states: Sequence[FutureRequestState]) -> Batch:
        """The requests of a step, whose tokens in it count as processed from now on."""
        columns = np.array([(self._row_of[item.state.request_id], item.state.position_offset, item.query_length)
                            for item in states], dtype=np.int64)
        rows, offsets, lengths = columns.T
        with self.lock:
            known = self._table[rows, 2]
            self._table[rows, 2] = np.maximum(known, offsets + lengths)
        return Batch([item.state.request_id for item in states], rows, offsets, lengths, known)

    def touch_of(self, batch: Batch) -> tuple[npt.NDArray[np.int32], Bits] | None:
        """Slot and touch bits of each token of the flat batch; None where no token is steered."""
        rows, offsets, lengths = batch.rows, batch.offsets, batch.lengths
        with self.lock:
            table = self._table
            if not self._num_steered or not table[rows, 0].any():
                return None
            slots = np.repeat(table[rows, 0], lengths)
            first = np.cumsum(lengths) - lengths
            index = np.repeat(table[rows, 1] + offsets - first, lengths) + np.arange(len(slots))
            index[slots == 0] = 0
            return slots.astype(np.int32), self._arena.on[index] & ~self._arena.off[index]

    def note(self, running: Running, token: int) -> None:
        """A token was drawn. Whether it is touched itself may depend on what it is."""
        position = len(running.token_ids)
        running.token_ids.append(token)
        touch = running.touch
        if touch is None or not touch.ruled or position >= len(touch.on):
            return
        gets, loses = touch.of_generated(position - touch.prompt_length, token)
        with self.lock:
            self._arena.on[running.base + position] |= np.uint32(gets)
            self._arena.off[running.base + position] |= np.uint32(loses)

    def measure(self, batch: Batch, taken: Taken, limit: StepLimit) -> None:
        """Add up how far tokens were moved that had not been processed before."""
        owners = batch.owners[taken.positions]
        new = batch.positions[taken.positions] >= batch.known[owners]
        with self.lock:
            self._measured.add(batch.rows[owners[new]], taken.interventions[new], taken.values[new], limit)

    def rewind(self, batch: Batch, request_id: str, token_ids: list[int]) -> None:
        """Undo for one completion what was noted for a step; `token_ids` are those it had before."""
        known = len(token_ids)
        for running in self.completions[request_id].running.runs:
            running.rewind(token_ids)
            with self.lock:
                if running.request_id in batch.request_ids:
                    place = batch.request_ids.index(running.request_id)
                    self._table[batch.rows[place], 2] = batch.known[place]
                if running.touch is not None:
                    rest = slice(running.base + known, running.base + len(running.touch.on))
                    self._arena.on[rest], self._arena.off[rest] = running.touch.on[known:], running.touch.off[known:]
