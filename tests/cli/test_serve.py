"""`trimtab serve` as one sees it in a shell: what it prints before it answers, and what it says then."""

import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

from server.cli.serve import ready_line
from server.settings import Settings

END_S = 300


def test_the_ready_line_is_what_a_shell_takes() -> None:
    command = shlex.split(ready_line("http://127.0.0.1:8000", Settings(model="x/it's", api_key="k")).partition(": ")[2])
    assert command[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert "Authorization: Bearer KEY" in command
    assert '"model": "it-s"' in command[-1]


def test_it_says_when_it_answers_and_nothing_noisy_before(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from server.cli import app; app()", "serve", "lab-dense", "--port", "0",
         "--no-examples", "--data-dir", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = threading.Timer(END_S, process.kill)
    watch.start()
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("Ready."):
                break
        assert lines[-1].startswith("Ready. Try: curl http://127.0.0.1:"), lines
        assert [line.split(";")[0] for line in lines[:-1]] == ["Loading lab-dense"]
        answer = subprocess.run(["bash", "-c", lines[-1].removeprefix("Ready. Try: ").replace("curl", "curl -sf", 1)],
                                capture_output=True, text=True, check=True).stdout
        assert '"content":' in answer
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        watch.cancel()
        process.stdout.close()
    assert process.returncode == 0
