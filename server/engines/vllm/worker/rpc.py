"""Methods that the engine calls on every worker by `collective_rpc`.

The plugin sets them on vLLM's Worker class, so `self` is a worker.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from server.engines.vllm.wire import Key, decode_program
from server.engines.vllm.worker.shelf import Kept
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


def trimtab_taken(self: Any, names: Sequence[str]) -> list[dict[str, Any] | None] | None:
    """What requests did on the layers of this worker, by their names; None on ranks that share layers with another."""
    state: WorkerState = self.trimtab
    return None if state.rank else state.steps.tallies.take(names)


def trimtab_forget(self: Any, tags: Sequence[str]) -> None:
    """Drop what was kept and captured under `tags`."""
    for tag in tags:
        self.trimtab.steps.kept.pop(tag, None)
        self.trimtab.steps.captured.pop(tag, None)


def trimtab_scores(self: Any, tag: str, token_ids: Sequence[int], full: bool) -> list[Any] | None:
    """Log-probabilities of a kept pass: that of each token after the first, and all of them if `full`.

    None on ranks of a pipeline that do not have its end.
    """
    state: WorkerState = self.trimtab
    if tag not in state.steps.kept:
        return None
    _, hidden = _taken(state.steps.kept, tag)
    chosen: list[torch.Tensor] = []
    everything: list[torch.Tensor] = []
    targets = torch.tensor([*token_ids[1:], 0], device=hidden.device)
    for i in range(0, len(hidden), ROWS_AT_ONCE):
        logits = _logits(self, hidden[i:i + ROWS_AT_ONCE])
        if logits is None:
            continue
        logprobs = logits.float().log_softmax(-1)
        chosen.append(logprobs.gather(1, targets[i:i + ROWS_AT_ONCE].unsqueeze(1)).squeeze(1).cpu())
        if full:
            everything.append(logprobs.cpu())
    if not chosen:
        return None
    return [_bytes(torch.cat(chosen)), _bytes(torch.cat(everything)) if full else b""]


def trimtab_next(self: Any, tags: Sequence[str]) -> bytes | None:
    """Log-probabilities of what follows each of some kept passes, `[len(tags), vocab_size]`; drops them."""
    state: WorkerState = self.trimtab
    if not set(tags) <= state.steps.kept.keys():
        return None
    rows = torch.cat([_taken(state.steps.kept, tag)[1][-1:] for tag in tags])
    parts = [logits.float().log_softmax(-1) for i in range(0, len(rows), ROWS_AT_ONCE)
             if (logits := _logits(self, rows[i:i + ROWS_AT_ONCE])) is not None]
    return _bytes(torch.cat(parts).cpu()) if parts else None


def trimtab_compare(self: Any, tag: str, other: str, token_ids: Sequence[int], residual: int | None,
                    ends: Sequence[int]) -> Any:
    """Divergence of two kept passes that predict `token_ids`, and if `residual` names a layer the shift of its stream.

    Keeps `tag` for further comparisons and drops `other`.
    """
    state: WorkerState = self.trimtab
    if tag not in state.steps.kept:
        return None
    steered, base = state.steps.kept[tag].joined()[1], _taken(state.steps.kept, other)[1]
    chosen = torch.tensor(token_ids, device=steered.device)
    parts: list[Divergence] = []
    for i in range(0, len(chosen), ROWS_AT_ONCE):
        block = slice(i, i + ROWS_AT_ONCE)
        ours, theirs = _logits(self, steered[block]), _logits(self, base[block])
        if ours is not None and theirs is not None:
            parts.append(divergence(ours, theirs, chosen[block], ends))
    shift = None
    if residual is not None:
        key: Key = ("resid_post", residual)
        here, there = state.steps.captured[tag][key].joined()[1], state.steps.captured[other][key].joined()[1]
        moved = residual_shift(here, there)
        shift = [_bytes(moved.relative), _bytes(moved.cosine)]
    state.steps.captured.pop(other, None)
    if not parts:
        return None
    whole = Divergence.join(parts)
    return [{name: _bytes(value.float().cpu()) for name, value in vars(whole).items()}, shift]


def trimtab_captured(self: Any, tag: str) -> list[list[Any]]:
    """Activations of a capturing pass: site, layer, number of rows, float32 bytes."""
    state: WorkerState = self.trimtab
    found = []
    for (site, layer), kept in state.steps.captured.pop(tag, {}).items():
        rows = kept.joined()[1]
        found.append([site, layer, len(rows), _bytes(rows)])
    return found


def _taken(kept: dict[str, Kept], tag: str) -> Any:
    return kept.pop(tag).joined()


@torch.inference_mode()
def _logits(worker: Any, hidden: torch.Tensor) -> torch.Tensor | None:
    """None on ranks that do not hold the gathered logits."""
    logits: torch.Tensor | None = worker.model_runner.get_model().compute_logits(hidden)
    return logits


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().float().numpy().tobytes()


RPC = (trimtab_describe, trimtab_place, trimtab_taken, trimtab_forget, trimtab_scores, trimtab_next, trimtab_compare,
       trimtab_captured)
