"""What keys, policies, quotas, the audit and traces cost a request, each on top of those before it, and all together.

    python -m benchmarks.company [--rounds 60] [--requests 64] [--tokens] [--json FILE]

A server of each arm runs in a process of its own, and the arms take turns under the same requests: chats of a few
tokens that a stored vector steers. The engine is a script, so what is left is the server's own work. Told is the CPU
time of the server's process for a request, with what its threads do behind it (rows of the audit, traces on their way):
medians over rounds, and the quartiles of the differences to the bare server in the same round. With --tokens the
servers run lab-dense instead, and tokens per CPU second are compared.

Each round is checked: keys, policies and quotas refuse what they should, the audit has a record and the collector the
spans of every request.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import options_of, run
from server.app import create_app
from server.boot import build
from server.cli.bundled import locate_model
from server.http.listener import bind
from server.http.runner import run as serve
from server.identity.keys import new_secret, spelled
from server.observability.logs import configure_logging
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from steering.artifacts.payload import Payload
from tests.server.scripted import ScriptedCompletion, ScriptedEngine
from tests.server.tokenizers import byte_tokenizer
from vectors.artifact import Metadata
from vectors.library import Library

MODEL, OWNER, TENANT = "bench", "the-owners-key", "team"
PARTS = ("keys", "policies", "quotas", "audit", "traces")
ARTIFACT, LAYER, NORM = "shared/calm", 2, 4.0
# The audit and the traces are written a second behind.
BEHIND_S = 2.5
# Rounds that are not counted.
WARM_UP = 4
SPANS = 5
QUOTA = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "tokens_per_period": 10**14,
         "parallel_requests": 10**6}
POLICY = {"models": ["bench*"], "artifacts": ["team/*", "shared/*"], "presets": ["team/*", "shared/*"],
          "ops": ["add", "ablate"], "sites": ["resid_post", "resid_pre"], "most_interventions": 4, "raw_vectors": False,
          "most_rel": 0.6}


@dataclass(frozen=True)
class Arm:
    name: str
    parts: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


class Parrot(ScriptedEngine):
    """Remembers nothing."""

    def generate(self, generation: Any) -> ScriptedCompletion:
        return ScriptedCompletion(self, generation)


class Collector:
    """Takes traces, as OpenTelemetry's collector does, and counts the spans."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found = self.found = dict[str, int]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                arm = self.path.split("/")[1]
                found[arm] = found.get(arm, 0) + sum(
                    len(scope.spans) for one in told.resource_spans for scope in one.scope_spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *given: Any) -> None:
                return

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()


@contextmanager
def redis(at: Path) -> Iterator[str | None]:
    """URL of a Redis that runs within the block; None where it is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    process = subprocess.Popen([program, "--port", "0", "--unixsocket", str(at / "redis"), "--save", "",
                                "--dir", str(at)], stdout=subprocess.DEVNULL)
    try:
        while not (at / "redis").exists():
            time.sleep(0.05)
        yield f"redis+unix://{at}/redis"
    finally:
        process.terminate()
        process.wait(60)


class Site:
    """The server of an arm, with what it needs in its library."""

    def __init__(self, arm: Arm, at: Path, model: str | None, opened: ExitStack) -> None:
        at.mkdir()
        width = 8 if model is None else json.loads((Path(model) / "config.json").read_text())["hidden_size"]
        self.arm, self._at = arm, at
        library = Library.open(f"sqlite:///{at}/library.db", str(at / "blobs"))
        library.create(Metadata(name=ARTIFACT, kind="vector", op="add", site="resid_post", residual_norm={LAYER: NORM}),
                       Payload.build("vector", {LAYER: {"vector": torch.ones(width) / width**0.5}}))
        self.headers: dict[str, str] = {}
        settings = {"data_dir": str(at), **({"model": model} if model else {}), **arm.settings}
        if "keys" in arm.parts:
            secret, digest = new_secret()
            key = library.keys.create(name="bench", tenant=TENANT, roles=["infer"], digest=digest, expires_at=None)
            self.headers["Authorization"] = f"Bearer {spelled(key.id, secret)}"
            settings["api_key"] = OWNER
        if "policies" in arm.parts:
            quota = {"quota": QUOTA} if "quotas" in arm.parts else {}
            library.policies.set(TENANT, "", {**POLICY, **quota})
            if quota:
                library.policies.set(TENANT, key.id, quota)
        settings["audit_steering_sample"] = float("audit" in arm.parts)
        library.close()
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.company", "--serve", json.dumps(settings)],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        opened.callback(process.wait, 60)
        opened.callback(process.terminate)
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told, f"the server of {arm.name} ended with {process.wait()}"
        self._pid = process.pid
        self.client = httpx.AsyncClient(base_url=told.strip(), headers=self.headers, timeout=120)

    async def ask(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json={
            "model": MODEL, "messages": [{"role": "user", "content": "hello good world"}], "max_tokens": 8,
            "steering": {"interventions": [{"artifact": ARTIFACT, "strength": {"value": 2.0, "unit": "unit"}}]},
            **fields})

    async def turn(self, requests: int, concurrent: int, **fields: Any) -> tuple[float, int]:
        """Wall seconds of so many requests, and the tokens they made."""
        left = list(range(requests))
        tokens = 0

        async def work() -> None:
            nonlocal tokens
            while left:
                left.pop()
                answer = await self.ask(**fields)
                assert answer.status_code == 200, answer.text
                tokens += answer.json()["usage"]["completion_tokens"]

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrent)))
        return time.perf_counter() - began, tokens

    async def check(self) -> None:
        """That this arm has what it should, and nothing else."""
        parts = self.arm.parts
        answer = await self.ask()
        assert answer.json()["steering"]["applied"][0]["artifact"] == f"{ARTIFACT}@1"
        assert ("x-ratelimit-limit-tokens" in answer.headers) is ("quotas" in parts)
        strong = {"interventions": [{"artifact": ARTIFACT, "strength": {"value": 3.0, "unit": "unit"}}]}
        assert (await self.ask(steering=strong)).status_code == (403 if "policies" in parts else 200)
        nobody = await self.client.get("/v1/models", headers={"Authorization": "Bearer x"})
        assert nobody.status_code == (401 if "keys" in parts else 200)

    def recorded(self) -> int:
        """Steered requests of which the audit has a record."""
        library = Library.open(f"sqlite:///{self._at}/library.db", str(self._at / "blobs"))
        try:
            assert library.audit.verify().fault is None
            return sum(one.action == "steer" for one in library.audit._all())
        finally:
            library.close()

    def cpu_s(self) -> float:
        """What its threads have used, in nanoseconds as Linux counts them."""
        threads = Path(f"/proc/{self._pid}/task").glob("*/schedstat")
        return sum(int(told.read_text().split()[0]) for told in threads) / 1e9


def serve_arm(given: dict[str, Any]) -> None:
    """The server of an arm, in a process of its own."""
    configure_logging("json")
    settings = Settings(served_model_name=MODEL, **given)
    if "model" in given:
        app = build(settings)
    else:
        tokenizer = byte_tokenizer()
        vocabulary = Vocabulary(tokenizer, [tokenizer.eos_token_id], len(tokenizer) + 4)
        engine = Parrot(vocabulary)
        engine.script = lambda generation: vocabulary.encode(" good good day", special_tokens=False)
        library = Library.open(settings.library_database_url, settings.library_blob_url)
        app = create_app(settings, engine, library, vocabulary, engine_name="scripted")
    serve(app, settings, bind("127.0.0.1", 0), lambda url: print(url, flush=True))


def arms_of(collector: str, redis_url: str | None, *, tokens: bool) -> list[Arm]:
    traced = {"trace_endpoint": f"{collector}/all"}
    parts = [Arm("bare"), *(Arm(f"+ {part}", PARTS[:n + 1]) for n, part in enumerate(PARTS[:-1]))]
    whole = Arm("all: + traces", PARTS, traced)
    more = [Arm("all, one trace in ten", PARTS, {"trace_endpoint": f"{collector}/tenth", "trace_sample": 0.1})]
    if redis_url is not None:
        more.append(Arm("all, quotas in Redis", PARTS, {"trace_endpoint": f"{collector}/redis",
                                                        "quota_store_url": redis_url}))
    return [parts[0], whole, *more] if tokens else [*parts, whole, *more]


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tt-") as at, ExitStack() as opened:
        collector = Collector()
        model = locate_model(arguments.model) if arguments.tokens else None
        arms = [arm for arm in arms_of(collector.url, opened.enter_context(redis(Path(at))), tokens=arguments.tokens)
                if arm.name == "bare" or any(word in arm.name for word in arguments.arms.split(","))]
        sites = [Site(arm, Path(at) / str(n), model, opened) for n, arm in enumerate(arms)]
        for site in sites:
            await site.check()
        fields = {"max_tokens": arguments.most, "ignore_eos": True} if arguments.tokens else {}
        found: dict[str, list[tuple[float, float, int]]] = {arm.name: [] for arm in arms}
        used = [site.cpu_s() for site in sites]
        for number in range(arguments.rounds + WARM_UP):
            turns = {}
            for site in random.sample(sites, len(sites)):
                turns[site.arm.name] = await site.turn(arguments.requests, arguments.concurrent, **fields)
            # Of the whole round, with what was done behind the requests in the turns of the others. What a server does
            # when nobody asks it is then in all of them alike.
            before, used = used, [site.cpu_s() for site in sites]
            if number >= WARM_UP:
                for site, more, less in zip(sites, used, before, strict=True):
                    found[site.arm.name].append((more - less, *turns[site.arm.name]))
        await asyncio.sleep(BEHIND_S)
        asked = (arguments.rounds + WARM_UP) * arguments.requests + 1
        for site in sites:
            if "audit" in site.arm.parts:
                assert site.recorded() == asked, f"{site.arm.name}: {site.recorded()} of {asked} are in the audit"
        if any(site.arm.settings.get("trace_endpoint", "").endswith("/all") for site in sites):
            assert collector.found["all"] >= asked * SPANS, collector.found
        for site in sites:
            await site.client.aclose()
    return (per_token if arguments.tokens else per_request)(found, arguments)


def per_request(found: dict[str, list[tuple[float, float, int]]], arguments: argparse.Namespace) -> dict[str, Any]:
    table = Table("arm", "CPU ms a request", "more than bare, ms", "quartiles", "wall ms", box=None)
    told = {}
    bare = found["bare"]
    for name, turns in found.items():
        ms = [cpu_s / arguments.requests * 1e3 for cpu_s, _, _ in turns]
        more = [one - other[0] / arguments.requests * 1e3 for one, other in zip(ms, bare, strict=True)]
        low, middle, high = statistics.quantiles(more, n=4)
        told[name] = {"cpu_ms": statistics.median(ms), "more_ms": middle, "quartiles": [low, high],
                      "wall_ms": statistics.median(wall for _, wall, _ in turns) / arguments.requests * 1e3}
        table.add_row(name, f"{told[name]['cpu_ms']:.2f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}",
                      f"{told[name]['wall_ms']:.2f}")
    Console(width=120).print(table)
    return {"rounds": arguments.rounds, "requests": arguments.requests, "arms": told}


def per_token(found: dict[str, list[tuple[float, float, int]]], arguments: argparse.Namespace) -> dict[str, Any]:
    table = Table("arm", "tokens per CPU second, of bare", "quartiles", "tokens/s, of bare", "quartiles", box=None)
    told = {}
    for name, turns in found.items():
        row: list[str] = []
        told[name] = {}
        for column, what in ((0, "cpu"), (1, "wall")):
            ratios = [(one[2] / one[column]) / (other[2] / other[column])
                      for one, other in zip(turns, found["bare"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            told[name][what] = [middle, low, high]
            row += [f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(name, *row)
    Console(width=120).print(table)
    return {"rounds": arguments.rounds, "requests": arguments.requests, "arms": told}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve_arm(json.loads(sys.argv[2]))
    else:
        parser = options_of(__doc__)
        parser.add_argument("--rounds", type=int, default=60)
        parser.add_argument("--requests", type=int, default=64, help="of each arm in a round")
        parser.add_argument("--arms", default="", help="words of the names of those to run beside the bare one")
        parser.add_argument("--concurrent", type=int, default=16)
        parser.add_argument("--tokens", action="store_true", help="compare tokens per second of a real model")
        parser.add_argument("--model", default="lab-dense")
        parser.add_argument("--most", type=int, default=64, help="tokens of an answer, with --tokens")
        run(parser, measure)
