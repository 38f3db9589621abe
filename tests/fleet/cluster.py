"""The parts of a fleet on one machine: a database, a Redis, a server of S3, replicas, and a balancer in front of them.

Each is a process of its own (S3 a thread of this one) that listens on a port of its own of 127.0.0.1.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from tests import postgres, redis_server
from tests.conftest import START_S, wait_until_ready
from tests.s3 import S3

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
needs_fleet = pytest.mark.skipif(None in (HAPROXY, redis_server.PROGRAM, postgres.programs()),
                                 reason="haproxy, redis-server or PostgreSQL is not installed")
OWNER = "the-owner-s-key"
BUCKET = "fleet"
# Three serve at a time; the others take the places of those that end.
FIRST, NAMES = ("a", "b", "c"), ("a", "b", "c", "d", "e")
# Far longer than any stream of the test, so that whatever is cut was not cut by this.
SHUTDOWN_S = 300
SETTINGS = {
    "TRIMTAB_API_KEY": OWNER, "TRIMTAB_LOG_FORMAT": "json", "TRIMTAB_MAX_REQUESTS": "32",
    "TRIMTAB_SHUTDOWN_S": str(SHUTDOWN_S), "TRIMTAB_SHADOW_SAMPLE": "0.2", "TRIMTAB_SHADOW_BUDGET": "10",
    "TRIMTAB_OUTCOME_SAMPLE": "0.2", "TRIMTAB_AUDIT_STEERING_SAMPLE": "0.05",
    # A busy machine is not to be taken for a Redis that is away.
    "TRIMTAB_QUOTA_STORE_TIMEOUT_S": "10",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
BALANCER = """
global
  maxconn 1000
  nbthread 1
defaults
  mode http
  timeout connect 10s
  timeout queue 60s
  timeout client 600s
  timeout server 600s
  timeout check 20s
  retries 3
  option redispatch
frontend front
  bind 127.0.0.1:{port}
  default_backend replicas
backend replicas
  balance roundrobin
  option httpchk GET /health/ready
  default-server check inter 500ms fastinter 200ms downinter 200ms fall 1 rise 1
  http-response set-header X-Replica %s
{servers}
"""


class Replica:
    """`trimtab serve lab-dense` in a process of its own, with a folder of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.port = name, folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, environment: dict[str, str]) -> None:
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from server.cli import app; app()", "serve", "lab-dense", "--port",
                 str(self.port), "--data-dir", str(self.folder / "data"), "--no-examples"],
                stdout=log, stderr=log, process_group=0, env={**os.environ, **SETTINGS, **environment})

    def wait(self) -> None:
        assert self.process is not None
        try:
            wait_until_ready(self.process, self.url, time.monotonic() + START_S)
        except TimeoutError as error:
            raise AssertionError(f"{self.name}: {error}: {(self.folder / 'log').read_text()[-3000:]}") from error

    def kill(self) -> None:
        """As a machine that loses its power."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=60)

    def tell_to_stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Of its log, those of one kind."""
        found = []
        for line in (self.folder / "log").read_text(errors="replace").splitlines():
            if line.startswith("{"):
                try:
                    read = json.loads(line)
                except ValueError:  # the last line of one that was killed
                    continue
                if read.get("event") == event:
                    found.append(read)
        return found


class Fleet:
    def __init__(self, folder: Path, database: postgres.Cluster, redis: redis_server.Redis, s3: S3) -> None:
        self.database, self.redis, self.s3 = database, redis, s3
        self.replicas = {name: Replica(name, folder / name) for name in NAMES}
        self.environment = {"TRIMTAB_DATABASE_URL": database.library_url(folder), "TRIMTAB_QUOTA_STORE_URL": redis.url,
                            "TRIMTAB_BLOB_URL": f"s3://{BUCKET}/blobs", **s3.environment()}
        self.port = free_port()
        self.front = f"http://127.0.0.1:{self.port}"
        self._folder = folder

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.alive]

    def start(self, names: Sequence[str]) -> None:
        """All at once, because each takes long to load its libraries."""
        for name in names:
            self.replicas[name].start(self.environment)
        for name in names:
            self.replicas[name].wait()

    def end(self) -> None:
        for replica in self.alive:
            replica.kill()

    @contextmanager
    def balanced(self) -> Iterator[None]:
        """With a balancer that asks each replica whether it is ready."""
        assert HAPROXY is not None
        configuration, log = self._folder / "haproxy.cfg", self._folder / "haproxy.log"
        configuration.write_text(BALANCER.format(port=self.port, servers="\n".join(
            f"  server {one.name} 127.0.0.1:{one.port}" for one in self.replicas.values())))
        with log.open("w") as output:
            process = subprocess.Popen([HAPROXY, "-db", "-f", str(configuration)], stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + START_S
            while not _answers(self.front):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            process.kill()
            process.wait(timeout=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def running(folder: Path) -> Iterator[Fleet]:
    """A fleet whose first three replicas are ready, without its balancer."""
    with ExitStack() as stack:
        database = stack.enter_context(postgres.running())
        database.make_template()
        redis = redis_server.Redis(folder)
        stack.callback(redis.stop)
        redis.start()
        s3 = stack.enter_context(S3().running())
        told = s3.environment()
        client = boto3.client("s3", endpoint_url=s3.url, region_name=told["AWS_DEFAULT_REGION"],
                              aws_access_key_id=told["AWS_ACCESS_KEY_ID"],
                              aws_secret_access_key=told["AWS_SECRET_ACCESS_KEY"])
        client.create_bucket(Bucket=BUCKET)
        client.close()
        fleet = Fleet(folder, database, redis, s3)
        stack.callback(fleet.end)
        fleet.start(FIRST)
        yield fleet
