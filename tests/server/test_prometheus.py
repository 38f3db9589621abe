"""Debian's Prometheus and Alertmanager on what a server says: every panel of the boards shows something, and an alert
reaches whoever is to be told.

What a board shows is twenty minutes of one request a second, of which 5 % are measured and graded. They are counted by
the metrics of a real server under a clock of the test's own, and put into Prometheus' database as what it would have
scraped.
"""

import asyncio
import json
import math
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import yaml
from fastapi import FastAPI

from server.effects.report import InArm
from server.http.runner import Server
from server.rollouts.arms import Arm
from steering.programs.program import Applied
from tests.server.conftest import chat

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
pytestmark = pytest.mark.skipif(not PROMETHEUS or not PROMTOOL, reason="Debian: apt-get install prometheus")
MINUTES, SCRAPE_S, SAMPLED, END_S = 20, 15, 0.05, 120
STEERED = {"interventions": [{"op": "add", "layers": [1], "inline": {"vector": [1.0] * 8}}]}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def program(*words: object, log: Path) -> Iterator[None]:
    with log.open("w") as out:
        process = subprocess.Popen([str(word) for word in words], stdout=out, stderr=out)
        try:
            yield
        finally:
            process.kill()
            process.wait()


@contextmanager
def prometheus(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with program(PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
                 f"--web.listen-address=127.0.0.1:{port}", log=folder / "prometheus.log"):
        yield f"http://127.0.0.1:{port}"


async def until(what: str, url: str, path: str, found: Any, log: Path, **params: Any) -> Any:
    """What the answer holds, as soon as it holds anything."""
    deadline = time.monotonic() + END_S
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        while time.monotonic() < deadline:
            try:
                answer = await client.get(path, params=params)
                if answer.status_code == 200 and (value := found(answer)):
                    return value
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
    raise AssertionError(f"{what}: {log.read_text()[-2000:]}")


def effect(random_: random.Random) -> Any:
    """What a measured completion is told as; only the fields that metrics read."""
    shift = SimpleNamespace(kl=SimpleNamespace(mean=random_.uniform(0.1, 0.3)))
    shares = [SimpleNamespace(artifact=name, op=op, kl=random_.uniform(0.05, 0.4), top1_changed=random_.random() / 3,
                              entropy_change=random_.gauss(0.05, 0.1))
              for name, op in (("all", "all"), ("calm@1", "add"))]
    return SimpleNamespace(
        shares=lambda: shares, total=shift, residual_relative=random_.uniform(0.02, 0.2),
        interventions=[SimpleNamespace(card_kl=0.2, artifact="calm@1", op="add", shift=shift)],
        text=SimpleNamespace(repetition=random_.random() / 10, compression=1.5, base_ended=random_.random()))


def second(app: FastAPI, n: int, random_: random.Random) -> None:
    """One request of a service: half are steered, one in thirty is refused."""
    state, metrics = app.state.server, app.state.metrics
    if n % 30 == 29:
        metrics.refused("not_found")
        metrics.answered("/v1/chat/completions", "POST", 404, 0.01)
        return
    steered = n % 2 == 0
    # A quarter of the users have the candidate of a roll-out.
    arm = Arm("ro-1", "mild@production", "candidate" if n % 8 == 0 else "stable", "mild@1", "mild@2")
    arms = (InArm(arm.rollout, arm.arm),) if steered else ()
    if steered:
        state.rollouts.counted(arm)
        state.rollouts._samples.labels(arm.rollout, "errors", arm.arm).inc()
        state.rollouts._evidence.labels(arm.rollout, "errors").set(random_.uniform(-0.2, 0.3))
        state.rollouts._least.labels(arm.rollout, "errors").set(n // 8)
        state.rollouts._share.labels(arm.rollout, arm.target).set(0.25)
    applied = cast(Applied, SimpleNamespace(artifact="calm@1", op="add"))
    metrics.admitted(40, [applied] if steered else [], False)
    metrics.first_token(random_.uniform(0.02, 0.2))
    metrics.completed(60, random_.uniform(1.0, 3.0))
    metrics.answered("/v1/chat/completions", "POST", 200, random_.uniform(1.0, 4.0))
    state.queue._waited.observe(random_.uniform(0.001, 0.02))
    if steered and random_.random() < SAMPLED:
        state.shadow._metrics.measured("mild@1", effect(random_), arms)
        state.shadow._metrics.ran(100)
    if random_.random() < SAMPLED:
        whose = ("all", "calm@1") if steered else ("untouched",)
        state.live_grading._metrics.graded("mild@1" if steered else "", whose, "refusal",
                                           random_.choice(["answered", "refused"]), arms, measured=False)


def timed(text: str, at: int) -> dict[str, list[str]]:
    """Samples of an exposition with their time, by the line that says of which type their metric is. OpenMetrics is
    what the tool reads, and it wants the samples of a metric together."""
    found: dict[str, list[str]] = {}
    kind = ""
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            # Untyped: that counters end in _total, and what else may be beside them, is of no matter here.
            kind = f"# TYPE {line.split()[2]} unknown"
        elif not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            name = re.match(r"[a-zA-Z_:]+\w*", series)
            assert name
            kind = f"# TYPE {name[0]} unknown"
            labels = series.removeprefix(name[0])
            labels = labels[:-1] + ',instance="a"}' if labels else '{instance="a"}'
            found.setdefault(kind, []).append(f"{name[0]}{labels} {value} {at}")
    return found


@pytest.fixture
async def traffic(app: FastAPI, client: httpx.AsyncClient, tmp_path: Path) -> int:
    """Twenty minutes of it in Prometheus' database. Returns when they ended."""
    end, random_ = int(time.time()) - 300, random.Random(1)
    lines: dict[str, list[str]] = {}
    for n in range(MINUTES * 60):
        second(app, n, random_)
        if n % SCRAPE_S == 0:
            for kind, samples in timed((await client.get("/metrics")).text, end - MINUTES * 60 + n).items():
                lines.setdefault(kind, []).extend(samples)
    text = "\n".join(line for kind, samples in lines.items() for line in (kind, *samples))
    (tmp_path / "scraped").write_text(f"{text}\n# EOF\n")
    done = subprocess.run([str(PROMTOOL), "tsdb", "create-blocks-from", "openmetrics", tmp_path / "scraped",
                           tmp_path / "tsdb"], capture_output=True, text=True, timeout=END_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return end - SCRAPE_S


def filled(expression: str) -> str:
    for name, value in {"$__rate_interval": f"{4 * SCRAPE_S}s", "$window": "30m", "$model": ".*", "$preset": ".*",
                        "$artifact": ".*", "$instance": ".*", "$rollout": ".*"}.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


async def empty_panels(url: str, board: dict[str, Any], at: int) -> dict[str, str]:
    """Titles of panels of which no query has a number, with the first query."""
    empty = {}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for panel in board["panels"]:
            numbers = 0
            for target in panel["targets"]:
                answer = await client.get("/api/v1/query", params={"query": filled(target["expr"]), "time": at})
                assert answer.status_code == 200, (target["expr"], answer.text)
                numbers += sum(math.isfinite(float(one["value"][1])) for one in answer.json()["data"]["result"])
            if not numbers:
                empty[panel["title"]] = panel["targets"][0]["expr"]
    return empty


async def test_every_panel_shows_data_at_one_request_a_second(traffic: int, tmp_path: Path) -> None:
    with prometheus(tmp_path, {"global": {"scrape_interval": "1h"}}) as url:
        await until("it does not start", url, "/-/ready", lambda answer: True, tmp_path / "prometheus.log")
        for path in BOARDS:
            board = json.loads(path.read_text())
            assert await empty_panels(url, board, traffic) == {}, path.name
        # The check sees panels that are empty: over a minute, most of what is sampled has nothing to show.
        sampled = (DEPLOY / "grafana" / "trimtab-effects.json").read_text()
        narrow = json.loads(sampled.replace("[$window]", "[$__rate_interval]"))
        assert len(await empty_panels(url, narrow, traffic)) > 5


class Told(BaseHTTPRequestHandler):
    """Takes what Alertmanager sends."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.alerts.extend(body["alerts"])  # type: ignore[attr-defined]
        self.server.told.set()  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Told)
    server.alerts, server.told = [], Event()  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
async def steered(server: Server, address: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        yield client


@pytest.mark.skipif(not ALERTMANAGER, reason="Debian: apt-get install prometheus-alertmanager")
async def test_an_alert_goes_from_the_server_to_whoever_is_to_be_told(steered: httpx.AsyncClient, address: str,
                                                                      receiver: HTTPServer, tmp_path: Path) -> None:
    """The files of deploy/prometheus, with ports and pauses of the test."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    sending = yaml.safe_load((DEPLOY / "prometheus" / "alertmanager.yml").read_text())
    sending["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    sending["receivers"][0]["webhook_configs"][0]["url"] = f"http://127.0.0.1:{receiver.server_port}/alerts"
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump(sending))
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", tmp_path)
    port = free_port()
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{port}"]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [address.removeprefix("http://")]
    with program(ALERTMANAGER, f"--config.file={tmp_path}/alertmanager.yml", f"--storage.path={tmp_path}/alertmanager",
                 f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", log=tmp_path / "sent.log"), \
            prometheus(tmp_path, config) as url:
        await until("it scrapes nothing", url, "/api/v1/query", lambda answer: answer.json()["data"]["result"],
                    tmp_path / "prometheus.log", query="trimtab_suppressed_requests_total")
        assert receiver.alerts == []  # type: ignore[attr-defined]
        await steered.put("/v1/admin/kill-switch", json={"on": True})
        assert (await steered.post("/v1/chat/completions", json=chat(steering=STEERED))).status_code == 200
        told = receiver.told  # type: ignore[attr-defined]
        assert await asyncio.to_thread(told.wait, END_S), (tmp_path / "sent.log").read_text()[-2000:]
    [alert] = receiver.alerts  # type: ignore[attr-defined]
    assert alert["labels"]["alertname"] == "TrimtabSteeringSuppressed" and alert["status"] == "firing"
    assert "kill switch" in alert["annotations"]["summary"] and alert["annotations"]["action"]
