"""Clients as they are published, in environments of their own, against `trimtab serve` on the bundled model.

`make test-clients` makes the environments and runs these tests; `make test` leaves them out.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import model_path
from tests.conftest import wait_until_ready

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("TRIMTAB_CLIENT_ENVIRONMENTS", HERE.parents[2] / ".venv" / "clients"))
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


@pytest.fixture(scope="session", params=ENGINES)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of each engine."""
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="the vLLM engine needs vLLM")
    folder = tmp_path_factory.mktemp(f"real-{request.param}")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from server.cli import app; app()", "serve", "lab-dense", "--engine", request.param,
             "--port", str(port), "--data-dir", str(folder / "data")], stdout=log, stderr=log)
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}", time.monotonic() + START_S)
            yield f"http://127.0.0.1:{port}"
        except TimeoutError as error:
            raise AssertionError(f"{error}: {(folder / 'log').read_text()[-2000:]}") from error
        finally:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture(scope="session")
def drive(url: str) -> Callable[..., Any]:
    """`drive(environment, script, *arguments)`: what the script, run in that environment, prints last, as JSON. It is
    given the server's address first."""

    def driven(environment: str, script: str, *arguments: str) -> Any:
        python = ENVIRONMENTS / environment / "bin" / "python"
        if not python.exists():
            pytest.skip(f"the environment {environment} is not there; run make test-clients")
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([str(python), str(HERE / "drivers" / script), url, *arguments], capture_output=True,
                              text=True, timeout=DRIVE_S, cwd=HERE, env=outside | OFFLINE)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return driven


@pytest.fixture(scope="session")
def model_folder() -> str:
    return str(model_path("lab-dense"))
