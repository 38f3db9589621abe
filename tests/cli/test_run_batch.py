"""`trimtab run-batch` against a server that counts: what was answered once is never asked again, also after kill -9."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

from server.cli import app

COUNT = 12


@dataclass
class Counting:
    """Answers up to `free` requests at once, and the rest when `gate` opens. refusals: statuses to begin with."""

    free: int = COUNT
    asked: Counter[str] = field(default_factory=Counter)
    gate: threading.Event = field(default_factory=threading.Event)
    refusals: list[int] = field(default_factory=list)
    most: int = 0
    running: int = 0
    url: str = ""


@pytest.fixture
def counting() -> Iterator[Counting]:
    state, lock = Counting(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.asked[body["prompt"]] += 1
                state.running += 1
                state.most = max(state.most, state.running)
                waits = sum(state.asked.values()) > state.free
                status = state.refusals.pop() if state.refusals else 400 if body["prompt"] == "bad" else 200
            if waits:
                state.gate.wait(60)
            with lock:
                state.running -= 1
            content = json.dumps({"said": body["prompt"]}).encode()
            self.send_response(status)
            for name, value in (("Content-Length", str(len(content))), ("Retry-After", "0"),
                                ("X-Trimtab-Request", "req-1")):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *given: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    state.gate.set()
    server.shutdown()
    server.server_close()
    thread.join()


def write(path: Path, prompts: list[str], **fields: Any) -> Path:
    path.write_text("\n".join(json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions",
                                          "body": {"model": "m", "prompt": prompt}, **fields})
                              for n, prompt in enumerate(prompts)))
    return path


def run(requests: Path, results: Path, url: str, *more: str) -> Result:
    return CliRunner().invoke(app, ["run-batch", str(requests), str(results), "--url", url, *more])


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_request_has_one_result(counting: Counting, tmp_path: Path) -> None:
    counting.refusals, counting.free = [503, 429], COUNT + 2
    requests = write(tmp_path / "in.jsonl", [*map(str, range(COUNT - 1)), "bad"])
    done = run(requests, tmp_path / "out.jsonl", counting.url, "--at-once", "3")
    assert done.exit_code == 0, done.output
    found = {line["custom_id"]: line for line in lines(tmp_path / "out.jsonl")}
    assert len(found) == len(lines(tmp_path / "out.jsonl")) == COUNT
    assert found["id-4"]["response"] == {"status_code": 200, "body": {"said": "4"}, "request_id": "req-1"}
    assert found[f"id-{COUNT - 1}"]["response"]["status_code"] == 400 and "1 refused" in done.output
    # Those that found no room were asked once more.
    assert sum(counting.asked.values()) == COUNT + 2 and counting.most <= 3
    again = run(requests, tmp_path / "out.jsonl", counting.url)
    assert again.exit_code == 0 and sum(counting.asked.values()) == COUNT + 2


def test_it_goes_on_after_it_was_killed(counting: Counting, tmp_path: Path) -> None:
    counting.free = 5
    requests, results = write(tmp_path / "in.jsonl", [*map(str, range(COUNT))]), tmp_path / "out.jsonl"
    process = subprocess.Popen([sys.executable, "-c", "from server.cli import app; app()", "run-batch", str(requests),
                                str(results), "--url", counting.url, "--at-once", "2"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (results.exists() and results.read_bytes().count(b"\n") == 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = lines(results)
    with results.open("ab") as file:
        file.write(b'{"custom_id": "id-9", "resp')
    counting.gate.set()
    answered = {line["response"]["body"]["said"] for line in before}
    asked = {name: counting.asked[name] for name in answered}
    done = run(requests, results, counting.url)
    assert done.exit_code == 0, done.output
    assert lines(results)[:5] == before
    assert sorted(line["custom_id"] for line in lines(results)) == sorted(f"id-{n}" for n in range(COUNT))
    assert {name: counting.asked[name] for name in answered} == asked == dict.fromkeys(answered, 1)


@pytest.mark.parametrize(("fields", "said"), [
    ({"custom_id": "same"}, "of an earlier one"), ({"url": "/v1/embeddings"}, "does not POST"),
    ({"body": 1}, "no body"),
    ({"body": {"stream": True}}, "asks for a stream"), ({"method": "GET"}, "does not POST")])
def test_a_file_that_is_wrong_is_refused_before_anything_is_asked(counting: Counting, tmp_path: Path, fields: Any,
                                                                 said: str) -> None:
    done = run(write(tmp_path / "in.jsonl", ["a", "b"], **fields), tmp_path / "out.jsonl", counting.url)
    assert done.exit_code == 1 and said in done.output + done.stderr
    assert not counting.asked


def test_two_runs_do_not_write_to_one_file(counting: Counting, tmp_path: Path) -> None:
    with FileLock(f"{tmp_path / 'out.jsonl'}.lock"):
        done = run(write(tmp_path / "in.jsonl", ["a"]), tmp_path / "out.jsonl", counting.url)
    assert done.exit_code == 1 and not counting.asked
