"""What tests of several folders need."""

import contextlib
import gc
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.postgres import Cluster, running

START_S = 300
# Files that take longest, from a quarter of a minute to minutes on an idle core. They begin first, so that at the end
# no worker is left alone with one. A file stays on one worker, which starts its engines and servers once.
LONGEST_FIRST = ("engines/vllm/test_v2_runner.py", "engines/vllm/test_parallel.py", "engines/vllm/test_exact.py",
                 "engines/vllm/test_stale_graph.py", "engines/vllm/test_restart.py", "engines/vllm/test_finite.py",
                 "engines/vllm/test_scopes.py", "engines/vllm/test_adapters.py", "e2e/test_chaos.py",
                 "lab/test_vllm.py", "e2e/test_console.py",
                 "e2e/test_load.py", "e2e/test_calibration.py", "engines/test_batching.py",
                 "clients/test_client.py", "engines/test_supervision.py", "checkpoints/test_convert.py",
                 "cli/test_bundled_library.py", "test_examples.py", "engines/test_finite.py", "lab/test_models.py",
                 "test_readme.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`--dist loadfile --no-loadscope-reorder` hands files out in this order."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """Python looks through all objects whenever an engine stops, as transformers asks for that, and often by itself.
    Millions of them are of imports and stay for ever, so they are left out, which saves a fifth of the time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What is left frozen is reported as leaked by libraries at the end of the process."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    with running() as cluster:
        cluster.make_template()
        yield cluster


@pytest.fixture(scope="session")
def lab_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`trimtab serve lab-dense`, shared: tests use artifact names of their own."""
    with serving(tmp_path_factory.mktemp("lab-server"), "lab-dense") as url:
        yield url


@contextlib.contextmanager
def serving(folder: Path, model: str) -> Iterator[str]:
    """Base URL of `trimtab serve MODEL` in a process of its own, on a library in `folder`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from server.cli import app; app()", "serve", model, "--port", str(port),
             "--data-dir", str(folder / "data")], stdout=log, stderr=log)
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}", time.monotonic() + START_S)
            yield f"http://127.0.0.1:{port}"
        except TimeoutError as error:
            raise AssertionError(f"{error}: {(folder / 'log').read_text()[-2000:]}") from error
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_until_ready(process: "subprocess.Popen[bytes]", url: str, deadline: float) -> None:
    """Raises TimeoutError if the server ends or does not answer in time."""
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        raise TimeoutError(f"the server ended with status {process.returncode}")
    raise TimeoutError(f"the server was not ready within {START_S} s")
