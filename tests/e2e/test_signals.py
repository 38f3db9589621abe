"""`trimtab serve` in a process of its own: what signals do, and a low limit of open files."""

import concurrent.futures
import json
import resource
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

from tests.conftest import wait_until_ready
from tests.e2e.serving import CHAT, LONG, once, serving, stream

OPEN_FILES = 300


def test_sigterm_cuts_nothing_and_leaves_with_0(tmp_path: Path) -> None:
    with serving(tmp_path, TRIMTAB_SHUTDOWN_S="0") as (process, url, log), \
            concurrent.futures.ThreadPoolExecutor() as pool:
        begun: list[concurrent.futures.Future[None]] = [concurrent.futures.Future() for _ in range(4)]
        streams = [pool.submit(stream, url, once(future)) for future in begun]
        wholes = [pool.submit(httpx.post, f"{url}{CHAT}", json={**LONG, "n": 4}, timeout=120) for _ in range(2)]
        for future in begun:
            future.result(timeout=120)
        process.send_signal(signal.SIGTERM)
        ends = [future.result(timeout=120) for future in streams]
        answers = [future.result(timeout=120) for future in wholes]
        assert process.wait(timeout=120) == 0
    told = 0
    for events in ends:
        assert events[-1] == "[DONE]"
        last = json.loads(events[-2])
        told += "error" in last
        assert last["error"]["code"] == "shutting_down" if "error" in last else last["choices"][0]["finish_reason"]
    assert told
    for answer in answers:
        assert answer.status_code in (200, 503)
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "shutting_down" and answer.headers["retry-after"]
    assert "Traceback" not in log.read_text() and "leaked" not in log.read_text()


def test_few_files_are_no_end_and_a_second_signal_is(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))

    with serving(tmp_path, limited, TRIMTAB_SHUTDOWN_S="3600", TRIMTAB_BODY_TIMEOUT_S="3600") as (process, url, log):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with ExitStack() as opened:
            crowd = [opened.enter_context(socket.create_connection(address, timeout=60)) for _ in range(2 * OPEN_FILES)]
            refused = crowd[-1].recv(4096)
            assert refused.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in refused
        wait_until_ready(process, url, time.monotonic() + 60)
        with socket.create_connection(address, timeout=60) as unfinished:
            unfinished.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                               b"Content-Type: application/json\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n")
            assert unfinished.recv(4096).startswith(b"HTTP/1.1 100 "), "the server reads the body, which never comes"
            process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 60
            while "shutting down" not in log.read_text():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            assert httpx.get(f"{url}/health/ready").json()["error"]["code"] == "shutting_down"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) in (0, 128 + signal.SIGINT)
    assert "Traceback" not in log.read_text()
