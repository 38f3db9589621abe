"""Throughput of a server that measures what its steering does, beside one that does not.

    python -m benchmarks.effects [--engine vllm] [--model NAME] [--rounds 9] [--requests 96] [--threads 1] [--json FILE]

One server in this process, one engine, the same steered requests in every arm: nothing measured; a sample of 5 % within
the default budget; 5 % and 20 % with a budget that never binds; report "summary" on every tenth request and on every
one, and the latter with nothing used of what the engine kept, as it was before. The arms take turns
in an order that turns round every time; a round's ratio is that of its own unmeasured arms, one at its start and one at
its end, whose mutual ratio is the noise of the machine. Time runs until the last answer is there *and* the last sampled
completion is measured, so that no cost hides behind the end. The same ratio is told of the CPU time of this process and
its children, which other work on the machine changes less.

Checks that every arm answers the same texts, but for rounding, that as many completions were measured as were drawn,
and that a reported KL is that of the engine's own log-probabilities.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table
from scipy.special import rel_entr

from benchmarks.command import cpu_seconds, options_of, run
from lab import model_path
from server.boot import build
from server.effects.metrics import EffectMetrics
from server.effects.report import ChoiceEffect
from server.effects.shadow import Finished, Shadow
from server.observability.instruments import Registry
from server.observability.logs import configure_logging
from server.requests.state import ServerState
from server.settings import Settings
from steering.language.spec import Steering

MODEL = "lab-dense"
CONCURRENT = 16
MAX_TOKENS = 24
UNBOUND = 10.0
# Share of answers that two unmeasured runs may give differently: numbers round by batch, and a draw that falls between
# two words takes the other one.
UNSTEADY = 0.03
PLACES = ("museum", "castle", "park", "market", "gallery", "zoo", "beach", "aquarium")


@dataclass(frozen=True)
class Arm:
    """reported: every which request asks for a report, 0 for none. budget: None for the server's default. kept: whether
    what the engine kept is used."""

    name: str
    sample: float = 0.0
    budget: float | None = UNBOUND
    reported: int = 0
    kept: bool = True


BASE, AGAIN = Arm("nothing measured"), Arm("nothing measured, again")
ARMS = (Arm("5 % sampled, default budget", 0.05, None), Arm("5 % sampled", 0.05), Arm("20 % sampled", 0.2),
        Arm('report "summary" on all, run again', reported=1, kept=False),
        Arm('report "summary" on 10 %', reported=10), Arm('report "summary" on all', reported=1))


class Forgetful(Shadow):
    """Uses nothing of what the engine kept."""

    async def _measured(self, finished: Finished, per_token: bool) -> ChoiceEffect | str:
        return await super()._measured(replace(finished, kept=None), per_token)


@dataclass(frozen=True)
class Ran:
    tokens_per_s: float
    tokens_per_cpu_s: float
    rerun: int
    texts: Sequence[str]
    measured: int
    answers: Sequence[dict[str, Any]]


class Bench:
    def __init__(self, state: ServerState, app: Any, client: httpx.AsyncClient, requests: int) -> None:
        self._state, self._app, self._client, self._requests = state, app, client, requests
        vector = torch.randn(state.engine.facts.d_model, generator=torch.Generator().manual_seed(5))
        self.interventions = [{"op": "add", "layers": [2], "inline": {"vector": vector.tolist()},
                               "strength": {"value": 40.0, "unit": "unit"}}]

    async def run(self, arm: Arm, seed: int) -> Ran:
        """The arm's requests, with a side channel of its own."""
        state = self._state
        registry = Registry()
        budget = state.settings.shadow_budget if arm.budget is None else arm.budget
        shadow = (Shadow if arm.kept else Forgetful)(
            state.engine, EffectMetrics(registry, MODEL), None, sample=arm.sample, budget=budget,
            decode=state.vocabulary.decode, end_ids=state.vocabulary.end_ids, seed=seed)
        self._app.state.server = replace(state, shadow=shadow)
        await shadow.start()
        gate = asyncio.Semaphore(CONCURRENT)
        began, worked = time.perf_counter(), cpu_seconds()
        answers = await asyncio.gather(*(self._ask(number, arm, gate) for number in range(self._requests)))
        await shadow.drained()
        elapsed, working = time.perf_counter() - began, cpu_seconds() - worked
        await shadow.stop()
        produced = sum(answer["usage"]["completion_tokens"] for answer in answers)
        counted = registry.get_sample_value("trimtab_effect_kl_nats_count", {
            "model": MODEL, "preset": "", "artifact": "all", "op": "all"})
        rerun = registry.get_sample_value("trimtab_effect_rerun_total", {"reason": "absent"})
        texts = [answer["choices"][0]["text"] for answer in answers]
        return Ran(produced / elapsed, produced / working, int(rerun or 0), texts, int(counted or 0), answers)

    async def _ask(self, number: int, arm: Arm, gate: asyncio.Semaphore) -> dict[str, Any]:
        async with gate:
            answer = await self._client.post("/v1/completions", json={
                "model": MODEL, "prompt": prompt(number), "max_tokens": MAX_TOKENS, "temperature": 1.0, "seed": number,
                "steering": {"interventions": self.interventions,
                             "report": "summary" if arm.reported and number % arm.reported == 0 else "none"}})
        answer.raise_for_status()
        body: dict[str, Any] = answer.json()
        return body

    async def check(self) -> None:
        runs = {arm.name: await self.run(arm, 0) for arm in (BASE, *ARMS)}
        for name, ran in runs.items():
            others = sum(a != b for a, b in zip(ran.texts, runs[BASE.name].texts, strict=True))
            assert others <= UNSTEADY * self._requests, f"{name}: measuring changed {others} answers"
            again = self._requests if "run again" in name else 0
            assert ran.rerun == again, f"{name}: the steered pass of {ran.rerun} completions was run again"
        assert runs[BASE.name].measured == 0
        assert runs[ARMS[-1].name].measured == self._requests
        assert runs[ARMS[-2].name].measured == -(-self._requests // 10)
        draws = random.Random(0)
        expected = sum(draws.random() < ARMS[2].sample for _ in range(self._requests))
        assert runs[ARMS[2].name].measured == expected, f"{runs[ARMS[2].name].measured} measured, {expected} drawn"
        await self._check_kl()

    async def _check_kl(self) -> None:
        """KL as reported against rel_entr of the engine's full log-probabilities, over the tokens it generated."""
        state = self._state
        steering = Steering.model_validate({"interventions": self.interventions, "report": "tokens"})
        program = state.planner.plan(steering, None).program
        answer = (await self._client.post("/v1/completions", json={
            "model": MODEL, "prompt": prompt(0), "max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True,
            "steering": steering.model_dump(mode="json", exclude_unset=True)})).json()
        told = answer["steering"]["effects"]["choices"][0]["per_token"]["kl"]
        start = state.vocabulary.encode(prompt(0), special_tokens=True)
        ids = list(start)
        for _ in told:
            scores = await state.engine.score(ids, program, prompt_length=len(start), full=True)
            assert scores.full is not None
            ids.append(int(scores.full[-1].argmax()))
        ours, base = [(await state.engine.score(ids, given, prompt_length=len(start), full=True)).full
                      for given in (program, None)]
        assert ours is not None and base is not None
        rows = slice(len(start) - 1, -1)
        expected = rel_entr(ours[rows].double().exp().numpy(), base[rows].double().exp().numpy()).sum(-1)
        worst = max(abs(a - b) for a, b in zip(told, expected, strict=True))
        assert worst < 1e-3 and max(told) > 0.01, f"reported KL is off by {worst}"


def prompt(number: int) -> str:
    return f"Review: I visited the {PLACES[number % len(PLACES)]} on Monday with {number} friends."


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    configure_logging("console")
    with tempfile.TemporaryDirectory() as folder:
        model = str(model_path(MODEL)) if arguments.model == MODEL else arguments.model
        app = build(Settings(model=model, served_model_name=MODEL, engine=arguments.engine, data_dir=Path(folder),
                             shadow_sample=0.0))
        transport = httpx.ASGITransport(app=app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://localhost",
                                                                       timeout=600) as client:
            state = app.state.server
            bench = Bench(state, app, client, arguments.requests)
            await bench.check()
            rounds = [await _round(bench, number) for number in range(arguments.rounds)]
            app.state.server = state
    return _summary(rounds, arguments)


async def _round(bench: Bench, number: int) -> dict[str, tuple[float, int, float]]:
    """Tokens per second, completions measured and tokens per second of CPU time, by arm; the unmeasured arm opens and
    closes the round."""
    order = [BASE, *(ARMS if number % 2 else reversed(ARMS)), AGAIN]
    found = {}
    for arm in order:
        ran = await bench.run(arm, number)
        found[arm.name] = ran.tokens_per_s, ran.measured, ran.tokens_per_cpu_s
    return found


def _ratios(rounds: list[dict[str, tuple[float, int, float]]], arm: Arm, which: int) -> tuple[float, float, float]:
    """Median and quartiles of an arm's figure over that of the unmeasured arms of its round."""
    base = [(r[BASE.name][which] if arm is AGAIN else (r[BASE.name][which] + r[AGAIN.name][which]) / 2) for r in rounds]
    found = [r[arm.name][which] / b for r, b in zip(rounds, base, strict=True)]
    first, middle, last = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return middle, first, last


def _summary(rounds: list[dict[str, tuple[float, int, float]]], arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"model": arguments.model, "engine": arguments.engine,
                               "threads": torch.get_num_threads(), "rounds": len(rounds),
                               "requests": arguments.requests, "concurrent": CONCURRENT, "tokens": MAX_TOKENS,
                               "arms": {}}
    table = Table("arm", "tokens/s", "measured", "ratio (median)", "quartiles", "of CPU time", "quartiles", box=None)
    for arm in (AGAIN, *ARMS):
        (ratio, *quarters), (of_cpu, *cpu_quarters) = (_ratios(rounds, arm, which) for which in (0, 2))
        row = {"tokens_per_s": statistics.median(r[arm.name][0] for r in rounds),
               "measured_share": sum(r[arm.name][1] for r in rounds) / len(rounds) / arguments.requests,
               "ratio": ratio, "quartiles": quarters, "cpu_ratio": of_cpu, "cpu_quartiles": cpu_quarters}
        results["arms"][arm.name] = row
        table.add_row(arm.name, f"{row['tokens_per_s']:.0f}", f"{row['measured_share']:.1%}", f"{ratio:.3f}",
                      f"{quarters[0]:.3f} to {quarters[1]:.3f}", f"{of_cpu:.3f}",
                      f"{cpu_quarters[0]:.3f} to {cpu_quarters[1]:.3f}")
    Console(width=130).print(table)
    return results


if __name__ == "__main__":
    parser = options_of(__doc__)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=96)
    run(parser, main)
