"""The production engine: stock vLLM, compiled, with a program per request."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prometheus_client import REGISTRY, generate_latest

from server.engines.adapters import Adapter, Adapters
from server.engines.base import Engine
from server.engines.checks import check_capture, check_compare, check_room, check_tokens
from server.engines.data import (
    Captured,
    CaptureRequest,
    CompareRequest,
    Comparison,
    Condition,
    Generation,
    Scores,
    Unready,
)
from server.engines.vllm.host.adapted import AdaptedEngine
from server.engines.vllm.host.completion import VllmCompletion
from server.engines.vllm.host.config import awake, check_names, context_of, engine_config, quiet
from server.engines.vllm.host.connection import Connection
from server.engines.vllm.host.lora import lora_request
from server.engines.vllm.host.options import VllmOptions
from server.engines.vllm.host.reading import ModelReading, engine_dtype, read_model
from server.engines.vllm.host.selftest import run_selftest
from server.engines.vllm.host.serving import Serving
from server.engines.vllm.manifest import STAGE_OPS
from server.engines.vllm.quiet import first_line
from server.errors import InvalidAdapter, InvalidSettings
from server.threads import in_thread
from steering.language.errors import EngineUnavailable, InvalidRequest, NotFound, TrimtabError, printable
from steering.models.facts import ModelFacts
from steering.ops import operations
from steering.programs.program import Program


class VllmEngine(Engine):
    """vLLM in processes of its own. See `base.Engine` for the contract."""

    features = frozenset({"structured_outputs", "resume"})
    # vLLM takes what was generated before for prompt, which these treat differently.
    not_resumed = ("presence_penalty", "frequency_penalty", "bad_words", "grammar")

    def __init__(self, options: VllmOptions) -> None:
        """
        Raises:
            InvalidSettings: an argument that vLLM refuses, or under which steering is not right.
            UnsupportedModel: no model there, or one of a family that is not steered in vLLM.
        """
        check_names(options)
        self.options = options
        self.cache_dir = options.cache_dir
        self.reading: ModelReading = read_model(options)
        with awake(), quiet():
            engine_config(options, self.reading)
        self.facts: ModelFacts = self.reading.facts
        self.end_ids = self.reading.end_ids
        adapters = Adapters()
        self.adapters = adapters if options.takes_adapters else None
        self.connection = Connection(options, self.reading, adapters, launched=lambda: self.serving.forget_slots(),
                                     prove=self._prove, lost=self._interrupt)
        self.serving = Serving(options, self.connection, self.facts.num_layers - 1, self.facts.vocab_size)
        self.slots, self.measuring = self.serving.slots, self.serving.measuring
        self._loading = asyncio.Lock()

    async def start(self) -> None:
        await self.connection.start()
        try:
            for name, folder in self.options.adapters.items():
                try:
                    await self.load_adapter(name, Path(folder))
                except InvalidAdapter as error:
                    raise InvalidSettings(f"the adapter {name} cannot be served: {error.message}",
                                          param=("vllm_adapters", name), fix=error.fix) from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        await self.connection.stop()
        if self.adapters is not None:
            await in_thread(self.adapters.close)

    def on(self, adapter: Adapter) -> AdaptedEngine:
        return AdaptedEngine(self, self.measuring, adapter)

    async def load_adapter(self, name: str, folder: Path) -> Adapter:
        adapters = self.adapters
        assert adapters is not None
        # One at a time, so that of two loads under a name the later one stays.
        async with self._loading:
            adapter = await in_thread(adapters.copy, name, folder, self.options.adapter_rank)
            try:
                await self.connection.call("add_lora", lora_request(adapter))
            except TrimtabError:
                raise
            except Exception as error:
                raise InvalidAdapter(f"vLLM refuses it: {first_line(error)[:300]}") from error
            before = adapters.get(name)
            adapters.add(adapter)
        if before is not None:
            await self._forget(before)
        return adapter

    async def unload_adapter(self, name: str) -> None:
        assert self.adapters is not None
        adapter = self.adapters.remove(name)
        if adapter is None:
            raise NotFound(f"there is no adapter {printable(name)!r}", param="lora_name")
        await self._forget(adapter)

    async def _forget(self, adapter: Adapter) -> None:
        """An engine that starts again has forgotten it by itself."""
        with suppress(EngineUnavailable):
            await self.connection.call("remove_lora", adapter.number)

    def generate(self, generation: Generation) -> VllmCompletion:
        self.connection.check_alive()
        if generation.contrast is not None:
            raise InvalidRequest("vLLM cannot keep two runs in one step", param="contrast")
        check_tokens([*generation.prompt_ids, *generation.generated_ids], self.facts)
        check_room(generation, self.max_sequence_tokens)
        if generation.request_id in self.connection.running:
            raise InvalidRequest(f"request id {generation.request_id} is in use", param="request_id")
        wrong = [name for name in self.not_resumed if getattr(generation.sampling, name)]
        if generation.generated_ids and wrong:
            raise InvalidRequest(f"with {wrong[0]} a completion cannot be gone on with", param=wrong[0])
        return VllmCompletion(self.serving, generation)

    async def score(self, token_ids: Sequence[int], program: Program | None = None, *, prompt_length: int | None = None,
                    roles: Sequence[str] | None = None, full: bool = False, top: int | None = None) -> Scores:
        check_tokens(token_ids, self.facts)
        return await self.measuring.score(token_ids, program, prompt_length, roles, full, top, None)

    async def next_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None = None) -> torch.Tensor:
        for token_ids in texts:
            check_tokens(token_ids, self.facts)
        return await self.measuring.next_logprobs(texts, program, None)

    async def capture(self, requests: Sequence[CaptureRequest], program: Program | None = None) -> list[Captured]:
        for request in requests:
            check_capture(request, self.facts)
        return await self.measuring.capture(requests, program)

    async def compare(self, request: CompareRequest) -> Comparison:
        check_compare(request, self.facts)
        found = await self.serving.comparing.with_kept(request)
        if isinstance(found, Comparison):
            return found
        return replace((await self.serving.comparing.all([request]))[0], rerun=found)

    async def compare_all(self, requests: Sequence[CompareRequest]) -> list[Comparison]:
        for request in requests:
            check_compare(request, self.facts)
        return await self.serving.comparing.all(requests)

    def capabilities(self) -> dict[str, Any]:
        in_graph = {site: STAGE_OPS[ops] for described in self.connection.described
                    for site, ops in described["graph"].items()}
        sites = {site: {"layers": list(layers), "width": self.facts.width(site), "ops": ops,
                        "in_graph": [op for op in ops if op in in_graph.get(site, ())]}
                 for site, layers in self.facts.sites.items()
                 for ops in [[op.name for op in operations() if site in op.sites]]}
        return {"engine": "vllm", "model": self.facts.model_id, "family": self.facts.family,
                "fingerprint": self.facts.fingerprint, "num_layers": self.facts.num_layers,
                "d_model": self.facts.d_model, "num_experts": self.facts.num_experts,
                "device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": engine_dtype(self.options),
                "adapters": self._adapters(),
                # vLLM does not compile a model with adapters on a CPU.
                "compiled": not self.options.eager and (self.adapters is None or torch.cuda.is_available()),
                "self_test": self.options.self_test, "sites": sites}

    def _adapters(self) -> dict[str, Any] | None:
        if self.adapters is None:
            return None
        return {"loaded": [adapter.name for adapter in self.adapters], "at_once": self.options.adapters_at_once,
                "rank": self.options.adapter_rank}

    def stats(self) -> dict[str, float]:
        return {"running": len(self.connection.running), "waiting": self.slots.num_waiting,
                "slots_total": self.slots.num_slots, "slots_used": self.slots.num_pinned,
                "slots_resident": self.slots.num_resident,
                "bank_bytes": float(sum(described["bytes"] for described in self.connection.described)),
                "restarts": self.connection.restarts.total(),
                "kv_blocks_total": max(2, -(-self.options.kv_cache_tokens // self.options.block_size))}

    def metrics(self) -> bytes:
        """vLLM's own metrics, which it keeps in the process-wide registry."""
        names = [name for name in REGISTRY._names_to_collectors if name.startswith("vllm:")]
        return generate_latest(REGISTRY.restricted_registry(names)) if names else b""

    @property
    def max_sequence_tokens(self) -> int:
        return context_of(self.options, self.reading)

    def condition(self) -> Condition:
        return self.connection.condition()

    def restarts(self) -> Mapping[Unready, int]:
        return dict(self.connection.restarts)

    # Used by the connection.

    async def _prove(self) -> None:
        if self.options.self_test:
            self.facts = await run_selftest(self.serving, self.facts)

    async def _interrupt(self) -> None:
        self.serving.interrupt()
