"""What tests of several folders need."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

START_S = 300


@pytest.fixture(scope="session")
def lab_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`trimtab serve lab-dense` in a process of its own, shared: tests use artifact names of their own."""
    folder = tmp_path_factory.mktemp("lab-server")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from server.cli import app; app()", "serve", "lab-dense", "--port", str(port),
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
