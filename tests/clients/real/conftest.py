"""Clients as they are published, in environments of their own, against `trimtab serve` on the bundled model.

`make test-clients` makes the environments and runs these tests; `make test` leaves them out.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab import model_path
from tests.conftest import wait_until_ready

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("TRIMTAB_CLIENT_ENVIRONMENTS", HERE.parents[2] / ".venv" / "clients"))
NODE = Path(os.environ.get("TRIMTAB_NODE", HERE.parents[2] / ".venv" / "node")) / "node"
ENGINES = os.environ.get("TRIMTAB_CLIENT_ENGINES", "transformers vllm").split()
START_S, DRIVE_S = 600, 400
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
LAYER, WIDTH = 2, 128
VECTOR = [2.0 if i % 3 else -3.0 for i in range(WIDTH)]
STEERING = {"interventions": [{"op": "add", "layers": [LAYER], "inline": {"vector": VECTOR}}]}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.clients)


@contextmanager
def serving(engine: str, model: str, folder: Path) -> Iterator[str]:
    """The address of `trimtab serve MODEL`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = ["-c", "from server.cli import app; app()", "serve", model, "--engine", engine, "--port", str(port),
               "--data-dir", str(folder / "data")]
    with running([sys.executable, *command], f"http://127.0.0.1:{port}", folder / "log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def running(command: Sequence[str], url: str, log: Path, **options: Any) -> Iterator[None]:
    """A server while it answers `/health/ready` at `url`, or what `path` says."""
    path = options.pop("path", "")
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, **options)
        try:
            if path:
                wait_until_answered(process, url + path, time.monotonic() + START_S)
            else:
                wait_until_ready(process, url, time.monotonic() + START_S)
            yield
        except TimeoutError as error:
            raise AssertionError(f"{error}: {log.read_text()[-2000:]}") from error
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_until_answered(process: "subprocess.Popen[Any]", url: str, deadline: float) -> None:
    """Raises TimeoutError."""
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer")


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="the vLLM engine needs vLLM")
    return str(request.param)


@pytest.fixture(scope="session")
def url(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of lab-dense on each engine."""
    with serving(engine, "lab-dense", tmp_path_factory.mktemp(f"real-{engine}")) as address:
        yield address


@pytest.fixture(scope="session")
def tools_url(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of lab-tools on each engine."""
    with serving(engine, "lab-tools", tmp_path_factory.mktemp(f"tools-{engine}")) as address:
        yield address


def environment(name: str) -> Path:
    """Raises Skipped: it was not made."""
    folder = ENVIRONMENTS / name
    if not folder.exists():
        pytest.skip(f"the environment {name} is not there; run make test-clients")
    return folder


@pytest.fixture(scope="session")
def drive(url: str) -> Callable[..., Any]:
    """`drive(environment, script, *arguments)`: what the script, run in that environment, prints last, as JSON. It is
    given the server's address first."""

    def driven(name: str, script: str, *arguments: str, first: str = url) -> Any:
        folder = environment(name)
        if name == "node":
            node = [str(NODE), "--preserve-symlinks", "--preserve-symlinks-main", str(folder / "drivers" / script)]
        else:
            node = [str(folder / "bin" / "python"), str(HERE / "drivers" / script)]
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([*node, first, *arguments], capture_output=True, text=True, timeout=DRIVE_S, cwd=HERE,
                              env=outside | OFFLINE)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return driven


@pytest.fixture(scope="session")
def model_folder() -> str:
    return str(model_path("lab-dense"))
