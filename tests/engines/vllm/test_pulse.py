"""The watchdog's parts, without vLLM: silence while work waits, processes that are stopped, and what is forecast."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from server.engines.adapters import Adapters
from server.engines.data import Sampling
from server.engines.vllm.host import connection as connection_module
from server.engines.vllm.host.connection import Connection
from server.engines.vllm.host.forecast import Forecast
from server.engines.vllm.host.options import VllmOptions
from server.engines.vllm.host.pulse import Processes, Pulse, Pulses, beating
from steering.language.errors import EngineUnavailable, InvalidRequest


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_silence_counts_only_while_work_waits() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    clock.now += 50
    assert pulse.silent_s == 0
    with pulse.work():
        assert pulse.silent_s == 0, "an idle engine has not been silent"
        clock.now += 7
        with pulse.work():
            clock.now += 1
            assert pulse.silent_s == 8, "more work hides no silence"
        pulse.beat()
        assert pulse.silent_s == 0
        clock.now += 3
        assert pulse.silent_s == 3
    assert pulse.silent_s == 0


def test_a_replica_that_hangs_is_not_hidden_by_one_that_works() -> None:
    clock = Clock()
    pulses = Pulses(clock)
    pulses.reset([0, 1])
    live, hung = (beating(pulses)(None, replica) for replica in (0, 1))
    with pulses.request() as first, pulses.request() as second:
        assert {first, second} == {0, 1}, "requests are spread"
        with pulses.work(first), pulses.work(second):
            clock.now += 7
            live.record(None, None)
            clock.now += 2
            assert pulses.silent_s == 9
            hung.record(None, None)
            assert pulses.silent_s == 2
    with pulses.work():
        clock.now += 3
        live.record(None, None)
        assert pulses.silent_s == 3, "a call waits for all of them"
        pulses.beat()
        assert pulses.silent_s == 0
    with pulses.request(0), pulses.request() as next_one:
        assert next_one == 1
    clock.now += 50
    assert pulses.silent_s == 0


def test_a_forecast_is_what_is_left_of_a_start_like_the_last() -> None:
    clock = Clock()
    forecast = Forecast((1.0, 20.0), attempts=3, clock=clock)
    forecast.begins()
    clock.now += 45
    forecast.done()
    assert forecast.pause() == 1.0
    assert forecast.condition("restarting").retry_after_s == 46
    clock.now += 11
    found = forecast.condition("restarting")
    assert (found.ready, found.live, found.reason, found.retry_after_s) == (False, True, "restarting", 35)
    clock.now += 1000
    assert forecast.condition("restarting").retry_after_s == 1, "late is soon over"
    forecast.failed()
    assert forecast.pause() == 20.0
    assert forecast.condition("restarting").retry_after_s == 65
    forecast.failed()
    forecast.failed()
    assert (forecast.condition("restarting").live, forecast.condition("restarting").reason) == (False, "exhausted")
    forecast.done()
    assert forecast.condition("restarting").live
    forecast.hung = True
    assert (forecast.condition("restarting").live, forecast.condition("restarting").reason) == (False, "hung")


@pytest.fixture
def child() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def llm_of(process: "subprocess.Popen[bytes]", **more: Any) -> Any:
    """As much of vLLM's AsyncLLM as is looked at."""
    manager = SimpleNamespace(processes=[SimpleNamespace(pid=process.pid)])
    return SimpleNamespace(engine_core=SimpleNamespace(resources=SimpleNamespace(engine_manager=manager)), **more)


async def wait_for(check: Any) -> None:
    async with asyncio.timeout(60):
        while not check():
            await asyncio.sleep(0.01)


async def test_a_stopped_process_is_seen_and_can_be_ended(child: "subprocess.Popen[bytes]") -> None:
    processes = Processes(llm_of(child))
    assert processes.running and not processes.stopped
    os.kill(child.pid, signal.SIGSTOP)
    await wait_for(lambda: processes.stopped)
    os.kill(child.pid, signal.SIGCONT)
    await wait_for(lambda: not processes.stopped)
    os.kill(child.pid, signal.SIGSTOP)
    processes.kill()
    await wait_for(lambda: not processes.running)
    processes.kill()


class Watched:
    """A connection to an engine that is one sleeping process; `launches` counts its starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        self.children: list[subprocess.Popen[bytes]] = []
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()
        self.lost = 0
        self.answering = asyncio.Event()
        self.answering.set()
        monkeypatch.setattr(connection_module, "WATCH_S", 0.01)
        monkeypatch.setattr(connection_module, "start_llm", self._start)
        options = VllmOptions(model="", model_id="m", back_off_s=(0.0,), **changes)
        self.connection = Connection(options, None, Adapters(), launched=lambda: None,  # type: ignore[arg-type]
                                     prove=self._nothing, lost=self._lose)

    def _start(self, *_: Any) -> Any:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.children.append(child)

        class Llm:
            output_handler = None
            engine_core = llm_of(child).engine_core

            @property
            def errored(self) -> bool:
                return child.poll() is not None

            async def collective_rpc(inner, method: str, args: Any = ()) -> list[Any]:
                await self.answering.wait()
                return [{"places": [], "graph": {}, "bytes": 0}]

            async def generate(inner, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
                while True:
                    item = await self.outputs.get()
                    if item is None:
                        return
                    yield item

            def shutdown(self, timeout: float | None = None) -> None:
                child.kill()
                child.wait()

        return Llm()

    async def _nothing(self) -> None:
        return None

    async def _lose(self) -> None:
        self.lost += 1
        # What vLLM tells the readers of a dead engine.
        self.outputs.put_nowait(None)


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    made: list[Watched] = []

    async def make(stall_s: float) -> Watched:
        made.append(Watched(monkeypatch, stall_s=stall_s))
        await made[-1].connection.start()
        return made[-1]

    yield make
    for one in made:
        await one.connection.stop()


async def test_a_stopped_engine_is_not_ready_and_serves_on_when_let_go(watched: Any) -> None:
    engine = await watched(600.0)
    os.kill(engine.children[0].pid, signal.SIGSTOP)
    await wait_for(lambda: not engine.connection.alive)
    found = engine.connection.condition()
    assert (found.reason, found.live) == ("stalled", True) and found.retry_after_s
    with pytest.raises(EngineUnavailable) as refused:
        engine.connection.check_alive()
    assert refused.value.retry_after_s
    os.kill(engine.children[0].pid, signal.SIGCONT)
    await wait_for(lambda: engine.connection.alive)
    assert engine.lost == 0 and len(engine.children) == 1


async def test_an_engine_that_stays_stopped_is_started_again(watched: Any) -> None:
    engine = await watched(0.05)
    os.kill(engine.children[0].pid, signal.SIGSTOP)
    await wait_for(lambda: len(engine.children) == 2 and engine.connection.alive)
    assert engine.lost == 1 and dict(engine.connection.restarts) == {"stalled": 1}
    assert not psutil.pid_exists(engine.children[0].pid)


async def test_an_engine_that_runs_and_says_nothing_is_started_again(watched: Any) -> None:
    engine = await watched(0.5)
    outputs = engine.connection.outputs("r", [1, 2], Sampling(max_tokens=3), {})
    engine.outputs.put_nowait("one")
    assert await anext(outputs) == "one"
    waiting = asyncio.ensure_future(anext(outputs, None))
    await wait_for(lambda: len(engine.children) == 2 and engine.connection.alive)
    assert dict(engine.connection.restarts) == {"stalled": 1}
    assert await waiting is None


async def test_a_reader_that_does_not_ask_for_more_is_no_stall(watched: Any) -> None:
    engine = await watched(0.05)
    outputs = engine.connection.outputs("r", [1, 2], Sampling(max_tokens=3), {})
    engine.outputs.put_nowait("one")
    assert await anext(outputs) == "one"
    # Many times the limit, by the watcher's own count.
    for _ in range(40):
        await asyncio.sleep(0.01)
        assert engine.connection.alive
    await outputs.aclose()
    assert len(engine.children) == 1


async def test_settings_that_vllm_refuses_are_the_requests_to_mend(watched: Any) -> None:
    """Should the bounds of the API and those of vLLM differ one day."""
    engine = await watched(600.0)
    for name, value in (("temperature", 5.0), ("presence_penalty", 9.0), ("top_p", 7.0), ("min_p", -1.0)):
        with pytest.raises(InvalidRequest, match=name):
            await anext(engine.connection.outputs("r", [1, 2], Sampling(max_tokens=3, **{name: value}), {}))
    assert engine.connection.alive and not engine.connection.running


async def test_a_dead_engine_is_started_again(watched: Any) -> None:
    engine = await watched(600.0)
    engine.children[0].kill()
    await wait_for(lambda: len(engine.children) == 2 and engine.connection.alive)
    assert dict(engine.connection.restarts) == {"restarting": 1}


async def test_an_engine_that_does_not_answer_at_its_start_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Watched(monkeypatch, start_s=0.5)
    engine.answering.clear()
    with pytest.raises(EngineUnavailable, match="vLLM did not start within 0.5 s") as refused:
        await engine.connection.start()
    assert refused.value.param == "vllm_start_s" and refused.value.fix
    assert engine.children[0].wait(60) != 0


def hang() -> None:
    time.sleep(600)


async def test_a_start_that_hangs_is_ended_with_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own start waits in a thread for processes that never say that they are ready."""
    engine = Watched(monkeypatch, start_s=1.0)
    begun: list[Any] = []

    def start_llm(*_: Any) -> Any:
        spawn = multiprocessing.get_context("spawn")
        begun.extend([spawn.Process(target=hang, name="EngineCore"), spawn.Process(target=hang, name="of-another")])
        for process in begun:
            process.start()
        begun[0].join()
        raise RuntimeError("Engine core initialization failed.")

    monkeypatch.setattr(connection_module, "start_llm", start_llm)
    with pytest.raises(EngineUnavailable, match="vLLM did not start within 1 s"):
        await engine.connection.start()
    assert begun[0].exitcode == -signal.SIGKILL
    assert begun[1].is_alive(), "what is not vLLM's is left alone"
    begun[1].kill()
    begun[1].join()


PARENT = """
import multiprocessing, sys, time

def child():
    from server.engines.vllm.plugin import end_with_parent
    end_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child).start()
    time.sleep(600)
"""


async def test_a_server_that_is_killed_leaves_no_engine_behind(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).parents[3]
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(root)}) as parent:
        assert parent.stdout is not None
        pid = int(await asyncio.to_thread(parent.stdout.readline))
        engine = psutil.Process(pid)
        assert engine.is_running()
        parent.kill()
        await asyncio.to_thread(psutil.wait_procs, [engine], 60)
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
