"""Captures activations of a job's texts, pass by pass beside traffic, and writes each row to its place."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from server.activations.rows import POSITIONS
from server.activations.store import Activations, StoredActivations
from server.activations.table import DTYPES, Column, Table
from server.background.job import Control
from server.engines.base import Engine
from server.engines.data import Captured, CaptureRequest
from server.engines.guests import Share
from server.requests.gates import decide_program
from server.text.prompts import Prompt
from steering.language.vocabulary import Site
from steering.programs.program import Program


@dataclass(frozen=True)
class Wanted:
    """What is to be read of some texts.

    Attributes:
        positions: of each text, counted from the start.
        mean: one row for each text, the mean over its positions, and not one for each position.
        dtype: of the numbers, a key of DTYPES.
    """

    prompts: Sequence[Prompt]
    sites: Mapping[Site, Sequence[int]]
    positions: Sequence[Sequence[int]]
    mean: bool
    dtype: str
    program: Program | None

    @property
    def tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def counts(self) -> list[int]:
        """Rows of each text."""
        return [1 if self.mean else len(positions) for positions in self.positions]

    def columns(self, widths: Mapping[Site, int]) -> dict[str, Column]:
        """Tensors of the file. Beside the activations, int32: `text [rows]`, the index of the text, and `position` and
        `token`, or where rows are means `count`, the positions that each is of."""
        rows = sum(self.counts())
        named = {name: Column(torch.int32, rows) for name in (
            "text", *(["count"] if self.mean else ["position", "token"]))}
        return named | {f"{site}.{layer}": Column(DTYPES[self.dtype], rows, widths[site])
                        for site, layers in self.sites.items() for layer in layers}


class Capture:
    """One job. `run` belongs in the thread of the job."""

    def __init__(self, wanted: Wanted, engine: Engine, share: Share, control: Control) -> None:
        self._wanted, self._engine, self._share, self._control = wanted, engine, share, control
        self._loop = asyncio.get_running_loop()
        counts = wanted.counts()
        self._starts = [0, *accumulate(counts)][:len(counts)]

    def run(self, store: StoredActivations, described: Activations, told: Mapping[str, str]) -> dict[str, Any]:
        """What is told of the activations, once they are stored.

        Raises:
            TrimtabError: as engine and store. Cancelled.
        """
        wanted = self._wanted
        columns = wanted.columns({site: self._engine.facts.width(site) for site in wanted.sites})
        with store.writing(described, columns, told) as table:
            self._name_rows(table)
            # Texts of near lengths share a pass, with little padding.
            order = sorted(range(len(wanted.prompts)), key=lambda n: len(wanted.prompts[n].token_ids))
            done, start = 0, 0
            while start < len(order):
                step = self._step(order, start)
                for n, captured in zip(step, self._control.result(self._captured(step), self._loop), strict=True):
                    self._put(table, n, captured)
                done += sum(len(wanted.prompts[n].token_ids) for n in step)
                start += len(step)
                self._control.progress(done / wanted.tokens, "capturing")
        return described.model_dump(mode="json")

    def _step(self, order: Sequence[int], start: int) -> Sequence[int]:
        """The texts of the next step. They come by length, so the last is the longest."""
        stop, most = start + 1, self._share.tokens
        while stop < len(order) and len(self._wanted.prompts[order[stop]].token_ids) * (stop + 1 - start) <= most:
            stop += 1
        return order[start:stop]

    async def _captured(self, step: Sequence[int]) -> list[Captured]:
        wanted = self._wanted
        prompts = [wanted.prompts[n] for n in step]
        await self._control.turn()
        async with self._share.step(len(step) * max(len(prompt.token_ids) for prompt in prompts)):
            decided = await decide_program(wanted.program, [prompt.token_ids for prompt in prompts], self._engine)
            together: dict[str | None, list[int]] = {}
            for i, one in enumerate(decided):
                together.setdefault(None if one.program is None else one.program.digest, []).append(i)
            found: dict[int, Captured] = {}
            for same in together.values():
                requests = [CaptureRequest(prompts[i].token_ids, wanted.sites, wanted.positions[step[i]],
                                           roles=prompts[i].roles) for i in same]
                found.update(zip(same, await self._engine.capture(requests, decided[same[0]].program), strict=True))
        return [found[i] for i in range(len(step))]

    def _put(self, table: Table, text: int, captured: Captured) -> None:
        for site, layers in captured.items():
            for layer, rows in layers.items():
                table.put(f"{site}.{layer}", self._starts[text],
                          rows.mean(dim=0, keepdim=True) if self._wanted.mean else rows)

    def _name_rows(self, table: Table) -> None:
        """Say of every row which token of which text it is."""
        wanted = self._wanted
        table.put("text", 0, torch.arange(len(wanted.prompts), dtype=torch.int32).repeat_interleave(
            torch.tensor(wanted.counts())))
        if wanted.mean:
            table.put("count", 0, _int32(list(map(len, wanted.positions))))
            return
        for n, (start, positions) in enumerate(zip(self._starts, wanted.positions, strict=True)):
            ids = wanted.prompts[n].token_ids
            table.put("position", start, _int32(positions))
            table.put("token", start, _int32([ids[position] for position in positions]))


def _int32(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def metadata(described: Activations, spec: Mapping[str, Any], positions: Sequence[int] | None) -> dict[str, str]:
    """Of the file: from it alone it can be told what the numbers are. positions: of each text, as asked for."""
    return {"model": described.model, "fingerprint": described.fingerprint, "pool": described.pool,
            POSITIONS: json.dumps(positions), "steering": json.dumps(spec, sort_keys=True)}
