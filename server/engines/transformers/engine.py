"""The embedded engine: transformers' continuous batching with a program per request."""

import asyncio
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import anyio
import structlog
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from server.engines.base import Engine
from server.engines.checkpoint import KnownFingerprints
from server.engines.checks import check_capture, check_compare, check_room, check_score, check_tokens
from server.engines.data import (
    Captured,
    CaptureRequest,
    CompareRequest,
    Comparison,
    Condition,
    Generation,
    ScoreRequest,
    Scores,
    Unready,
)
from server.engines.keeping import KeptRows, Room
from server.engines.slots import Lease, SlotTable
from server.engines.transformers.canary import check_batching
from server.engines.transformers.comparing import Comparing
from server.engines.transformers.constraints import follow
from server.engines.transformers.continued import Continued
from server.engines.transformers.delivery import Delivery
from server.engines.transformers.finite import Watch
from server.engines.transformers.forward import ForwardPass, TokenRun, padded_passes
from server.engines.transformers.grammars import Grammars
from server.engines.transformers.handover import on_loop
from server.engines.transformers.head import Head
from server.engines.transformers.loading import load_model
from server.engines.transformers.options import EngineOptions
from server.engines.transformers.roster import Roster
from server.engines.transformers.running import EngineCompletion, Failure, OfWeak, Running
from server.engines.transformers.steps import Steps
from server.engines.transformers.stock import Manager, check_stock
from server.engines.transformers.supervisor import Supervisor
from server.threads import in_thread
from steering.acting.containment import Fault, fault_error, model_error
from steering.acting.selftest import SelfTest, narrowed, run_selftest
from steering.acting.steerer import Steerer
from steering.language.errors import EngineFailed, EngineUnavailable, InvalidRequest, TrimtabError
from steering.models.describe import model_facts
from steering.models.facts import ModelFacts
from steering.models.fingerprints import fingerprint
from steering.ops import operations
from steering.programs.program import Program
from steering.residency.row_table import RowTable

log = structlog.get_logger(__name__)
T = TypeVar("T")
# Each text of a pass may end elsewhere, and logits are made for every text at every end.
TEXTS_PER_PASS = 16


class TransformersEngine(Engine):
    """A model in this process. See `base.Engine` for the contract."""

    features = frozenset({"batched_scores", "contrast", "resume", "structured_outputs"})

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.cache_dir = options.cache_dir
        self.model: Any = load_model(options)
        self.facts: ModelFacts = model_facts(self.model, model_id=options.model_id,
                                             fingerprint=_fingerprint(self.model, options))
        ends = self.model.generation_config.eos_token_id
        self.end_ids = tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.selftest: SelfTest | None = None
        self.rows = RowTable(options.slots, self.model.device)
        self.slots = SlotTable(options.slots, self._place, max_waiting=options.slot_queue, wait_s=options.slot_wait_s)
        self.steerer = Steerer(self.model, self.rows)
        self.watch = Watch(self.model, self.facts.num_layers - 1)
        self.head = Head(self.model)
        if not self.head.usable:
            log.warning("nothing_kept", why="the model's head cannot be run by itself", family=self.facts.family)
        self._room = Room(options.kept_bytes)
        self._grammars = Grammars(options.model, self.facts.vocab_size, seconds=options.grammar_s,
                                  cache_bytes=options.grammar_cache_bytes)
        self.roster = Roster(self._retired)
        self.steps = Steps(self.roster, self.steerer, self.watch, self.head, options.step_limit)
        self.forward = ForwardPass(self.model, self.facts.num_layers - 1, self.watch, options.step_limit)
        self._comparing = Comparing(self.forward, self.head, options.step_limit, self._aside, self._completion,
                                    self.steps.roster.share)
        self._continued = Continued(self.forward, self.head, self._aside, self._completion, self.steps.roster.share)
        self.supervisor = Supervisor(options, self.steps, make=self._make_manager, prove=self._prove,
                                     advanced=self._advanced)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pass_lock = asyncio.Lock()
        # Held while a request takes the slots of two programs: two that held one each would wait for each other.
        self._pairing = asyncio.Lock()
        self._passes = 0

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        check_stock()
        try:
            await self.supervisor.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        await self.supervisor.stop()
        self.steerer.detach()
        self.forward.steerer.detach()
        self.watch.detach()
        self.head.detach()

    def generate(self, generation: Generation) -> EngineCompletion:
        condition = self.condition()
        if not condition.ready:
            raise condition.error()
        return self._completion(generation)

    def _completion(self, generation: Generation) -> EngineCompletion:
        self._check(generation)
        seed = generation.sampling.seed
        running = Running.build(generation, secrets.randbits(63) if seed is None else seed % 2**63)
        kept = None if generation.keep_from is None else KeptRows(generation.keep_from, self._room)
        if kept is not None and not self.head.usable:
            kept.lose("head")
        return EngineCompletion(running, self._admit, self.supervisor.leave, self.roster.touched, self._explain, kept)

    async def score(self, token_ids: Sequence[int], program: Program | None = None, *, prompt_length: int | None = None,
                    roles: Sequence[str] | None = None, full: bool = False, top: int | None = None) -> Scores:
        check_tokens(token_ids, self.facts)
        run = TokenRun(token_ids, len(token_ids) if prompt_length is None else prompt_length, program, roles)
        return await self._aside(lambda: self.forward.score(run, full, top))

    async def next_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None = None) -> torch.Tensor:
        for text in texts:
            check_tokens(text, self.facts)
        found = torch.empty(len(texts), self.facts.vocab_size)
        # Of near lengths together: little padding, and few positions whose logits are made.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for chosen in padded_passes([len(texts[i]) for i in order]):
            for start in range(0, len(chosen), TEXTS_PER_PASS):
                part = [order[i] for i in chosen[start:start + TEXTS_PER_PASS]]
                runs = [TokenRun(texts[i], len(texts[i]), program) for i in part]
                found[part] = await self._aside(partial(self.forward.next_logprobs, runs))
        return found

    async def score_all(self, requests: Sequence[ScoreRequest]) -> list[torch.Tensor]:
        for request in requests:
            check_score(request, self.facts)
        return await self._continued.scores(requests)

    async def following(self, requests: Sequence[ScoreRequest]) -> torch.Tensor:
        for request in requests:
            check_score(request, self.facts)
        return await self._continued.following(requests)

    async def capture(self, requests: Sequence[CaptureRequest], program: Program | None = None) -> list[Captured]:
        for request in requests:
            check_capture(request, self.facts)
        found: list[Captured] = []
        for chosen in padded_passes([len(request.token_ids) for request in requests]):
            part = [requests[i] for i in chosen]
            found += await self._aside(partial(self.forward.capture, part, program))
        return found

    async def compare(self, request: CompareRequest) -> Comparison:
        check_compare(request, self.facts)
        return await self._comparing.one(request)

    async def compare_all(self, requests: Sequence[CompareRequest]) -> list[Comparison]:
        """Neighbours under the same program share their passes."""
        for request in requests:
            check_compare(request, self.facts)
        return await self._comparing.all(requests)

    def capabilities(self) -> dict[str, Any]:
        sites = {
            site: {"layers": list(layers), "width": self.facts.width(site),
                   "ops": [op.name for op in operations() if site in op.sites]}
            for site, layers in self.facts.sites.items()
        }
        return {"engine": "transformers", "model": self.facts.model_id, "family": self.facts.family,
                "fingerprint": self.facts.fingerprint, "num_layers": self.facts.num_layers,
                "d_model": self.facts.d_model, "num_experts": self.facts.num_experts,
                "device": str(self.model.device), "dtype": str(self.model.dtype).removeprefix("torch."),
                "self_test": self.selftest is not None, "sites": sites}

    def stats(self) -> dict[str, float]:
        manager = self.supervisor.manager
        processor = None if manager is None else manager.batch_processor
        scheduler = None if processor is None else processor.scheduler
        active = 0 if scheduler is None else len(scheduler.active_requests)
        total = 0 if processor is None else processor.cache.num_blocks
        free = 0.0 if processor is None else processor.cache.compute_free_capacity()
        return {"running": active, "waiting": max(len(self.roster.completions) - active, 0) + self.slots.num_waiting,
                "slots_total": self.slots.num_slots, "slots_used": self.slots.num_pinned,
                "slots_resident": self.slots.num_resident, "bank_bytes": self.rows.nbytes,
                "kv_blocks_total": total, "kv_blocks_used": round(total * (1 - float(free)))}

    @property
    def max_sequence_tokens(self) -> int:
        return min(self.facts.context_length, self.options.kv_cache_tokens)

    @property
    def max_contrast_tokens(self) -> int:
        pages = -(-self.options.kv_cache_tokens // self.options.page_size)
        return min(self.facts.context_length, pages // 2 * self.options.page_size)

    def condition(self) -> Condition:
        return self.supervisor.condition()

    def restarts(self) -> Mapping[Unready, int]:
        return self.supervisor.restarts()

    # Admission: a slot, then the engine's queue.

    async def _admit(self, completion: EngineCompletion) -> None:
        running = completion.running
        running.matcher = await self._grammars.matcher(running.generation.sampling)
        if not follow(running.matcher, running.generation.generated_ids):
            raise EngineUnavailable("what was generated before does not fit its grammar")
        await self._lease(running)
        try:
            self.roster.add(completion)
        except BaseException:
            self._retired(running)
            raise
        try:
            self.supervisor.enqueue(running)
        except BaseException:
            self.roster.retire(running.request_id)
            raise

    async def _lease(self, running: Running) -> None:
        """A slot for each program of a completion."""
        if running.weak is None:
            if running.program is not None:
                running.lease = await self.slots.lease(running.program)
            return
        async with self._pairing:
            try:
                for run in running.runs:
                    if run.program is not None:
                        run.lease = await self.slots.lease(run.program)
            except BaseException:
                self._retired(running)
                raise

    async def _explain(self, running: Running, failure: Failure) -> TrimtabError:
        """Why a completion was given up. What overflowed behind the interventions may be the model's own doing: a pass
        without them tells."""
        if isinstance(failure, OfWeak):
            assert running.weak is not None
            error = await self._explain(running.weak, failure.failure)
            return error.at("contrast", "weak") if error.path else error
        if isinstance(failure, TrimtabError):
            return failure
        program = running.program
        if isinstance(failure, Fault):
            assert program is not None
            return fault_error(program, failure, self.options.step_limit)
        tokens = running.token_ids[:failure.position + 1]
        if program is None or not await self._aside(lambda: self.forward.is_finite(tokens)):
            return model_error(failure.position, self.model.dtype)
        strongest = None if running.measured is None else running.measured.strongest()
        return fault_error(program, Fault(program.first_acting if strongest is None else strongest, None, failure.layer,
                                          failure.position, math.inf, behind=True))

    def _retired(self, running: Running) -> None:
        """In the engine's thread or on the event loop: what held a slot does so no more."""
        for run in running.runs:
            if run.lease is not None:
                assert self._loop is not None
                on_loop(self._loop, Lease.release, run.lease)

    async def _place(self, slot: int, program: Program) -> bool:
        self.rows.place(slot, [item.rows for item in program.compiled])
        return False

    # Passes beside generation.

    async def _aside(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread while the generation loop is paused. One at a time, as all of them use one set of
        hooks, and whoever leaves stays until its thread has ended."""
        async with self._pass_lock:
            manager = self.supervisor.usable
            if manager is None:
                raise self.condition().error()

            def paused() -> T:
                with ExitStack() as stack:
                    try:
                        stack.enter_context(manager.pause())
                    except RuntimeError as error:
                        raise EngineUnavailable("the engine stopped before it could measure") from error
                    result = work()
                    self._passes += 1
                    return result

            # In no other queue for threads: a measurement that has its turn begins.
            return await in_thread(paused, limiter=anyio.CapacityLimiter(1), failure=EngineFailed)

    # Checks and set-up.

    def _check(self, generation: Generation) -> None:
        check_tokens(generation.prompt_ids, self.facts)
        check_room(generation, self.max_sequence_tokens if generation.contrast is None else self.max_contrast_tokens)
        if generation.contrast is not None:
            _check_two([generation.program, generation.contrast.weak], self.options)
        if generation.request_id in self.roster.completions:
            raise InvalidRequest(f"request id {generation.request_id} is in use", param="request_id")

    def _advanced(self) -> tuple[int, bool]:
        return self.steps.done + self._passes, bool(self.roster.completions) or self._pass_lock.locked()

    def _make_manager(self) -> Manager:
        """Proves that the model is reached, and makes what runs it."""
        if self.options.self_test:
            self.selftest = run_selftest(self.model, self.facts)
            if self.selftest.missed:
                log.warning("sites_not_reached", missed=[f"{s}[{n}]" for s, n in self.selftest.missed])
            self.facts = narrowed(self.facts, self.selftest)
        return self._stock_manager()

    def _bind(self, processor: Any) -> None:
        processor.scheduler.max_requests_per_batch = min(self.options.max_requests, self.options.max_batch_tokens)
        self.steps.bind(processor)

    async def _prove(self) -> None:
        if self.options.self_test:
            await check_batching(self, self._completion, self.model.dtype, self.options.step_limit.largest)

    @torch.no_grad()
    def _stock_manager(self) -> Manager:
        options = self.options
        config = ContinuousBatchingConfig(
            page_size=options.page_size,
            num_blocks=max(1, -(-options.kv_cache_tokens // options.page_size)),
            max_batch_tokens=options.max_batch_tokens,
            # A companion may join each of them.
            max_requests_per_batch=min(2 * options.max_requests, options.max_batch_tokens),
            allow_block_sharing=options.share_prefixes,
            # Plans are made from the tokens of the step before, and hooks choose their tokens by index: one batch at a
            # time, and no graphs of fixed shape.
            use_async_batching=False, use_cuda_graph=False)
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        manager = Manager(self._bind, Delivery(self.roster), model=self.model, generation_config=generation,
                          continuous_batching_config=config)
        manager.warmup()
        return manager


def _check_two(programs: Sequence[Program | None], options: EngineOptions) -> None:
    """Raises InvalidRequest where the engine has no room for two runs of a request."""
    acting = {program.identity for program in programs if program is not None and program.acting}
    if len(acting) > options.slots or options.max_batch_tokens < 2:
        raise InvalidRequest("a contrast needs two slots and two tokens in a batch, which this server does not have",
                             param="contrast", fix="Raise the settings slots and max_batch_tokens.")


def _fingerprint(model: Any, options: EngineOptions) -> str:
    """That of the checkpoint, found again where its files are those of before. Numbers that were rounded to float16 on
    the way are others than the checkpoint's, so what they give is kept for nobody."""
    known = KnownFingerprints(None if options.dtype == "float16" else options.cache_dir)
    found = known.get(options.model)
    if found is None:
        found = fingerprint(model)
        known.keep(options.model, found)
    return found
