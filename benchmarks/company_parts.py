"""The parts of what `benchmarks.company` measures, each by itself: `python -m benchmarks.company_parts [--json FILE]`.

Microseconds a request of the calling thread's own time, which other work on the machine changes little; medians of nine
runs. A key of a tenant is looked up; a spec is planned with and without the policy; quotas of the tenant and of the key
are counted in memory; a record of the audit is written, by the 500; what is traced of a request is noted, and of that
five spans are made and encoded for the collector, by the 500 requests.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import options_of, run
from benchmarks.company import ARTIFACT, LAYER, MODEL, NORM, POLICY, QUOTA, TENANT, Parrot
from server.activations.store import StoredActivations
from server.identity.counters import LocalCounters
from server.identity.keys import Keys, new_secret, spelled
from server.identity.principal import CURRENT, Principal
from server.identity.quotas import Quotas, count_tokens, tokens_used
from server.observability.instruments import Registry
from server.observability.tracing import Tracing, record
from server.requests.killswitch import KillSwitch
from server.requests.planner import Planner
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from steering.artifacts.payload import Payload
from steering.language.spec import Steering
from tests.server.tokenizers import byte_tokenizer
from vectors.artifact import Metadata
from vectors.library import Library
from vectors.library.audit.notes import Actor, Note

TIMES, RUNS = 500, 9
CHAT = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "trimtab", "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL, "gen_ai.response.id": "req", "gen_ai.request.choice.count": 1,
        "gen_ai.usage.input_tokens": 12, "gen_ai.usage.output_tokens": 4, "trimtab.engine": "scripted",
        "trimtab.presets": ("calm@1",), "trimtab.artifacts": (f"{ARTIFACT}@1",)}


def own_us(work: Callable[[], object], times: int = TIMES) -> float:
    found = []
    for _ in range(RUNS):
        began = time.thread_time()
        for _ in range(times):
            work()
        found.append((time.thread_time() - began) / times * 1e6)
    return statistics.median(found)


async def quotas_us(who: Principal) -> float:
    quotas = Quotas(LocalCounters(), Registry())
    await quotas.start()
    used: Any = SimpleNamespace(prompt_tokens=12, completion_tokens=4)
    found = []
    for _ in range(RUNS):
        began = time.thread_time()
        for number in range(TIMES):
            async with quotas.holding(who, f"req-{number}") as asked:
                assert asked is not None
                await asked.enter()
                await count_tokens(20)
                tokens_used(used)
                assert asked.headers
        found.append((time.thread_time() - began) / TIMES * 1e6)
    await quotas.stop()
    return statistics.median(found)


def spans(tracing: Tracing) -> None:
    with tracing.request("POST", {}, {"trimtab.request_id": "req"}) as span:
        began = time.time_ns()
        record("engine.queue", began, attributes={"trimtab.choice": 0})
        record("engine.prefill", began, attributes={"trimtab.choice": 0, "gen_ai.usage.input_tokens": 12})
        record("engine.decode", began, attributes={"trimtab.choice": 0, "gen_ai.usage.output_tokens": 4})
        record(f"chat {MODEL}", began, attributes=CHAT)
        span.ended("POST", "/v1/chat/completions", 200, {"trimtab.key": "bench", "trimtab.tenant": TENANT})


async def measure(arguments: argparse.Namespace) -> dict[str, float]:
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    from server.observability.spans import Unfolding

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as at:
        library = Library.open(f"sqlite:///{at}/library.db", f"{at}/blobs")
        library.create(Metadata(name=ARTIFACT, kind="vector", op="add", site="resid_post", residual_norm={LAYER: NORM}),
                       Payload.build("vector", {LAYER: {"vector": torch.ones(8) / 8**0.5}}))
        secret, digest = new_secret()
        key = library.keys.create(name="bench", tenant=TENANT, roles=["infer"], digest=digest, expires_at=None)
        library.policies.set(TENANT, "", {**POLICY, "quota": QUOTA})
        library.policies.set(TENANT, key.id, {"quota": QUOTA})
        keys = Keys(library.keys, b"owner", Registry(), policies=library.policies)
        await keys.refresh()
        given = spelled(key.id, secret).encode()
        found["the key is looked up"] = own_us(lambda: keys.find(given))
        tokenizer = byte_tokenizer()
        engine = Parrot(Vocabulary(tokenizer, [tokenizer.eos_token_id], len(tokenizer) + 4))
        planner = Planner(Settings(served_model_name=MODEL, data_dir=Path(at)), library, engine.facts,
                          KillSwitch(library.switches, Registry(), always=False),
                          StoredActivations(Path(at, "activations"), most_bytes=1, seconds=1))
        asked = Steering.model_validate({"interventions": [{"artifact": ARTIFACT, "strength": 0.5}]})
        who = keys.find(given)
        CURRENT.set(replace(who, policies=()))
        without = own_us(lambda: planner.plan(asked, None))
        CURRENT.set(who)
        found["the policy is held to"] = own_us(lambda: planner.plan(asked, None)) - without
        found["quotas are counted"] = await quotas_us(who)
        told = {"user": None, "presets": {}, "applied": [{"artifact": f"{ARTIFACT}@1", "op": "add", "layers": [LAYER],
                                                          "strength": {"scale": {"2": 2.0}}, "source": "request"}]}
        notes = [Note("steer", MODEL, actor=Actor(key.id, "bench", TENANT, "127.0.0.1", f"req-{n}"),
                      at=datetime.now(UTC), after=told) for n in range(TIMES)]
        found["a record of the audit is written"] = own_us(lambda: library.audit.add_all(notes), 1) / TIMES
        library.close()
    ended: list[Any] = []
    processor: Any = SimpleNamespace(on_end=ended.append)
    tracing = Tracing(processor)
    found["what is traced is noted"] = own_us(lambda: spans(tracing))
    some, encoder = ended[:TIMES], SimpleNamespace(export=lambda made: encode_spans(made).SerializeToString())
    unfolding = Unfolding(cast(Any, encoder))
    found["spans are made of it and encoded"] = own_us(lambda: unfolding.export(some), 1) / TIMES
    found["all"] = sum(found.values())
    table = Table("what", "microseconds a request", box=None)
    for name, us in found.items():
        table.add_row(name, f"{us:.0f}")
    Console().print(table)
    return found


def main(arguments: argparse.Namespace) -> dict[str, float]:
    return asyncio.run(measure(arguments))


if __name__ == "__main__":
    run(options_of(__doc__), main)
