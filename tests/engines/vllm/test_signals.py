"""Ctrl-C in a terminal reaches every process of the group: the server drains, and its engine serves it to the end."""

import concurrent.futures
import json
import os
import signal
from pathlib import Path

import pytest

from tests.e2e.serving import once, serving, stream

STREAMS = 16


@pytest.mark.slow
def test_ctrl_c_cuts_nothing_and_leaves_with_0(tmp_path: Path) -> None:
    with serving(tmp_path, TRIMTAB_ENGINE="vllm", TRIMTAB_VLLM_EAGER="true", TRIMTAB_SHUTDOWN_S="1",
                 TRIMTAB_KV_CACHE_TOKENS="8192") as (process, url, log), \
            concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        begun: list[concurrent.futures.Future[None]] = [concurrent.futures.Future() for _ in range(STREAMS)]
        streams = [pool.submit(stream, url, once(future)) for future in begun]
        for future in begun:
            future.result(timeout=300)
        os.killpg(process.pid, signal.SIGINT)
        ends = [future.result(timeout=300) for future in streams]
        assert process.wait(timeout=300) == 0
    told = 0
    for events in ends:
        assert events[-1] == "[DONE]"
        last = json.loads(events[-2])
        told += "error" in last
        assert last["error"]["code"] == "shutting_down" if "error" in last else last["choices"][0]["finish_reason"]
    assert told
    assert "Traceback" not in log.read_text()
