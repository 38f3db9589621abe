"""Methods that the engine calls on every worker by `collective_rpc`.

The plugin sets them on vLLM's Worker class, so `self` is a worker.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from server.engines.scoring import placed
from server.engines.vllm.wire import Key, decode_program
from server.engines.vllm.worker.state import WorkerState
from steering.divergence import Divergence, divergence, residual_shift

ROWS_AT_ONCE = 128


def trimtab_describe(self: Any) -> dict[str, Any]:
    """What was hooked, on this rank."""
    state: WorkerState = self.trimtab
    from vllm.compilation.counter import compilation_counter

    nbytes = state.graph.nbytes + sum(table.nbytes for table in state.steps.tables.values())
    return {"places": [[site, layer] for site, layer in state.hooks.found],
            "graph": {site: place.ops for (site, _), place in state.graph.places.items()}, "bytes": nbytes,
            "steps": state.steps.num_steps, "v2": bool(self.use_v2_model_runner),
            "graphs_loaded": compilation_counter.num_aot_artifacts_loaded,
            "dtype": str(self.vllm_config.model_config.dtype).removeprefix("torch.")}


def trimtab_place(self: Any, slot: int, program: bytes) -> tuple[bool, str | None]:
    """Put a program into a slot. Whether the compiled graph carries it out, and the digest of what is there now."""
    state: WorkerState = self.trimtab
    rows = decode_program(program)
    # In a pipeline the rest of the program is for other ranks.
    here = set(state.hooks.found)
    own = tuple({key: row for key, row in by_key.items() if key in here} for by_key in rows.rows)
    in_graph = state.steps.place(slot, replace(rows, rows=own))
    return in_graph, state.steps.holds(slot)


def trimtab_spell(self: Any, spellings: Sequence[str]) -> None:
    """How each token is written, one character per byte."""
    self.trimtab.steps.spellings = list(spellings)


def trimtab_taken(self: Any, names: Sequence[str]) -> list[dict[str, Any] | None] | None:
    """What requests did on the layers of this worker, by their names; None on ranks that share layers with another."""
    state: WorkerState = self.trimtab
    return None if state.rank else state.steps.tallies.take(names)


def trimtab_forget(self: Any, tags: Sequence[str]) -> None:
    """Drop what was kept and captured under `tags`."""
    for tag in tags:
        self.trimtab.steps.shelf.forget(tag)


def trimtab_scores(self: Any, tag: str, token_ids: Sequence[int], full: bool, top: int | None) -> list[Any] | None:
    """Of a kept pass: what `placed` keeps of its rows, and all their log-probabilities if `full`.

    None on ranks of a pipeline that do not have its end.
    """
    state: WorkerState = self.trimtab
    if tag not in state.steps.shelf.hidden:
        return None
    _, hidden = _taken(state, tag)
    parts: list[list[torch.Tensor]] = []
    everything: list[torch.Tensor] = []
    targets = torch.tensor([*token_ids[1:], 0], device=hidden.device)
    for i in range(0, len(hidden), ROWS_AT_ONCE):
        logits = _logits(self, hidden[i:i + ROWS_AT_ONCE])
        if logits is None:
            continue
        logprobs = logits.float().log_softmax(-1)
        parts.append(placed(logprobs, targets[i:i + ROWS_AT_ONCE], top))
        if full:
            everything.append(logprobs.cpu())
    if not parts:
        return None
    columns = [_bytes(torch.cat(column)) for column in zip(*parts, strict=True)]
    return [columns, _bytes(torch.cat(everything)) if full else b""]


def trimtab_next(self: Any, tags: Sequence[str]) -> bytes | None:
    """Log-probabilities of what follows each of some kept passes, `[len(tags), vocab_size]`; drops them."""
    state: WorkerState = self.trimtab
    if not set(tags) <= state.steps.shelf.hidden.keys():
        return None
    rows = torch.cat([_taken(state, tag)[1][-1:] for tag in tags])
    parts = [logits.float().log_softmax(-1) for i in range(0, len(rows), ROWS_AT_ONCE)
             if (logits := _logits(self, rows[i:i + ROWS_AT_ONCE])) is not None]
    return _bytes(torch.cat(parts).cpu()) if parts else None


def trimtab_compare(self: Any, given: Sequence[Mapping[str, Any]], forget: Sequence[str]) -> list[Any] | None:
    """Divergence of pairs of kept passes, and if `residual` names a layer the shift of its stream; or of a pair that is
    not all there which pass is missing, "memory" where the steered one was dropped for want of room.

    Each of `given` names two passes, `steered` and `other`, over the `token_ids` that they predict from the position
    `first` on. The first `same` rows of the other one are those of the steered one, and were not run again. Drops
    `other`, and what `forget` names; the steered pass is kept for further comparisons. None on ranks that do not have
    the logits.
    """
    found = [_compared(self, one) for one in given]
    trimtab_forget(self, forget)
    return None if any(one is None for one in found) else found


def _compared(worker: Any, given: Mapping[str, Any]) -> Any:
    state: WorkerState = worker.trimtab
    if not _is_last():
        return None
    shelf, token_ids, first, same = state.steps.shelf, given["token_ids"], given["first"], given["same"]
    count = len(token_ids)

    def pair(key: Key | None) -> list[torch.Tensor] | str:
        steered = shelf.span(given["steered"], first, count, key)
        rest = shelf.span(given["other"], first + same, count - same, key) if same < count else None
        if steered is None:
            return "memory" if given["steered"] in shelf.dropped else "steered"
        if rest is None:
            return [steered, steered] if same == count else "other"
        return [steered, torch.cat([steered[:same], rest])]

    states, streams = pair(None), None if given["residual"] is None else pair(("resid_post", given["residual"]))
    shelf.forget(given["other"])
    missing = next((one for one in (states, streams) if isinstance(one, str)), None)
    if missing is not None or isinstance(states, str):
        return missing
    chosen = torch.tensor(token_ids, device=states[0].device)
    parts: list[Divergence] = []
    for i in range(0, count, ROWS_AT_ONCE):
        block = slice(i, i + ROWS_AT_ONCE)
        ours, theirs = (_logits(worker, rows[block]) for rows in states)
        if ours is not None and theirs is not None:
            parts.append(divergence(ours, theirs, chosen[block], given["ends"]))
    shift = None
    if streams is not None and not isinstance(streams, str):
        moved = residual_shift(*streams)
        shift = [_bytes(moved.relative), _bytes(moved.cosine)]
    if not parts:
        return None
    whole = Divergence.join(parts)
    return [{name: _bytes(value.float().cpu()) for name, value in vars(whole).items()}, shift]


def trimtab_captured(self: Any, tag: str) -> list[list[Any]]:
    """Activations of a capturing pass: site, layer, number of rows, float32 bytes."""
    state: WorkerState = self.trimtab
    found = []
    for (site, layer), kept in state.steps.shelf.captured.pop(tag, {}).items():
        rows = kept.joined()[1]
        found.append([site, layer, len(rows), _bytes(rows)])
    return found


def _taken(state: WorkerState, tag: str) -> Any:
    return state.steps.shelf.hidden.pop(tag).joined()


def _is_last() -> bool:
    """Whether this rank has the end of the pipeline, and so the final hidden states."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


@torch.inference_mode()
def _logits(worker: Any, hidden: torch.Tensor) -> torch.Tensor | None:
    """None on ranks that do not hold the gathered logits."""
    logits: torch.Tensor | None = worker.model_runner.get_model().compute_logits(hidden)
    return logits


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().float().numpy().tobytes()


RPC = (trimtab_describe, trimtab_place, trimtab_spell, trimtab_taken, trimtab_forget, trimtab_scores, trimtab_next,
       trimtab_compare, trimtab_captured)
