"""One kind of trouble each. What must not have happened is a fault. A server that they end is started again after."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import httpx

from benchmarks.chaos.chaos import BUSY, DOWN, HANG_S, Chaos
from benchmarks.chaos.clients import Said, half_request, leave_stream, slow_reader
from benchmarks.chaos.oracle import Answer, Body, Broken, ask, brief, read
from benchmarks.chaos.poison import asked_in_every_way, raw_poisons, sampling_poisons, steering_poisons
from benchmarks.chaos.storing import import_query

Scenario = Callable[[Chaos], Awaitable[None]]
COMPLETE = "/v1/completions"
# vLLM on a busy machine.
RESTART_S = 300.0


async def poisonous_values(chaos: Chaos) -> None:
    """Numbers that overflow beside innocents, in every way a request can be asked."""
    d_model, num_layers = chaos.innocents.d_model, chaos.innocents.num_layers
    steered = steering_poisons(d_model, num_layers)
    asked = [*sampling_poisons(), *asked_in_every_way(chaos.random.choice(steered[:12])),
             *chaos.random.sample(steered, min(len(steered), 12 * chaos.amounts.size))]
    chaos.random.shuffle(asked)
    async with chaos.beside():
        for start in range(0, len(asked), 4):
            await asyncio.gather(*(_poisoned(chaos, body) for body in asked[start:start + 4]))
        for raw in raw_poisons(chaos.innocents.model):
            try:
                answer = read(await chaos.http.post(COMPLETE, content=raw,
                                                    headers={"Content-Type": "application/json"}))
                if not 400 <= answer.status < 500:
                    chaos.fault(f"{raw[:80]!r} got {answer.status} {answer.code}")
            except (Broken, httpx.HTTPError) as error:
                chaos.fault(f"{raw[:80]!r}: {error!r}")
            chaos.counts["poison"] += 1


async def _poisoned(chaos: Chaos, changes: Body) -> None:
    body = chaos.completion(**{"max_tokens": 4, "ignore_eos": True, **changes})
    answer = await chaos.try_(COMPLETE, body)
    chaos.counts["poison"] += 1
    if answer is None:
        return
    if answer.code is None and not all(answer.texts):
        chaos.fault(f"an empty 200: {brief(changes)}")
    if answer.status >= 500:
        chaos.fault(f"a client's numbers got {answer.status} {answer.code}: {brief(changes)}")


async def cancellations(chaos: Chaos) -> None:
    """Clients leave at every state a request can be in: unread, waiting, in the prompt, in the answer, forked."""
    async with chaos.beside():
        for _ in range(2 * chaos.amounts.size):
            await asyncio.gather(*(leave_stream(chaos, chaos.random.choice((0, 0, 1, 2, 5, 12))) for _ in range(12)))
        # More than fit into one batch, all gone at once.
        tasks = [asyncio.create_task(leave_stream(chaos, 10**6, max_tokens=200)) for _ in range(40)]
        await asyncio.sleep(chaos.random.random() * 2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def slow_and_dead_clients(chaos: Chaos) -> None:
    """Half a head, half a body, a stream that nobody reads: they cost nobody else anything."""
    kinds: tuple[Said, ...] = ("head", "body", "nothing")
    held = [await half_request(chaos.server.url, kind) for kind in kinds * (5 * chaos.amounts.size)]
    held += [await slow_reader(chaos.server.url, chaos.completion(stream=True, max_tokens=200, ignore_eos=True))
             for _ in range(8)]
    async with chaos.beside():
        await asyncio.sleep(1)
    for _, writer in held:
        writer.transport.abort()
    chaos.counts["dead clients"] += len(held)


async def floods(chaos: Chaos) -> None:
    """One client sends far more than can run; another's few tokens are answered or told when to come again."""
    async with chaos.beside(BUSY), httpx.AsyncClient(
            base_url=chaos.server.url, timeout=HANG_S, limits=httpx.Limits(max_connections=400)) as http:
        bodies = [chaos.completion(prompt=["a cat"] * chaos.random.choice((1, 8)), max_tokens=4,
                                   n=chaos.random.choice((1, 4)), seed=i) for i in range(120 * chaos.amounts.size)]
        bodies += [chaos.completion(max_tokens=200, ignore_eos=True, timeout_s=1.0) for _ in range(8)]
        # A large and a small prompt beyond any context, a body beyond any limit, and numbers that are too many.
        bodies += [chaos.completion(prompt="a " * count) for count in (20_000, 500_000)]
        bodies += [chaos.completion(steering={"interventions": [
            {"op": "add", "layers": [1], "inline": {"vector": [0.5] * 200_000}}]})]
        answers = await asyncio.gather(*(chaos.try_(COMPLETE, body, http) for body in bodies))
    for answer in answers:
        chaos.counts["flood answered" if answer and answer.code is None else "flood refused"] += 1
        if answer and answer.status >= 500 and answer.code not in (*BUSY, "request_timeout"):
            chaos.fault(f"a flooding request got {answer.status} {answer.code}")
        if answer and answer.status == 503 and answer.retry_after is None:
            chaos.fault(f"503 {answer.code} without Retry-After")


async def switches(chaos: Chaos) -> None:
    """Kill switch and default spec flip under load: each answer is the one of a state that held, and says which."""
    default = {"interventions": [chaos.innocents.intervention()]}
    body = chaos.completion(temperature=0, ignore_eos=True, logprobs=1)
    plain = await chaos.try_(COMPLETE, body)
    await _set(chaos, "PUT", "/v1/admin/default-spec", default)
    steered = await chaos.try_(COMPLETE, body)
    await _set(chaos, "DELETE", "/v1/admin/default-spec")
    if plain is None or steered is None or (plain.steered, steered.steered) != (0, 1) or plain.same_numbers(steered):
        chaos.fault(f"the default spec does not show: {plain}, {steered}")
        return
    over = asyncio.Event()

    async def watch() -> None:
        while not over.is_set():
            answer = await chaos.try_(COMPLETE, body)
            chaos.counts["answers under flips"] += 1
            if answer is None or answer.code is not None:
                continue
            expected = steered if answer.steered else plain
            # A switch that is set while a request runs acts from a token on, which the receipt names.
            if not (answer.same_numbers(expected) if answer.switched_off is None
                    else answer.begins_as(expected, answer.switched_off)):
                chaos.fault(f"a mixture of states: {answer}")

    watchers = [asyncio.create_task(watch()) for _ in range(3)]
    try:
        for _ in range(5 * chaos.amounts.size):
            await _set(chaos, "PUT", "/v1/admin/default-spec", default)
            await _set(chaos, "PUT", "/v1/admin/kill-switch", {"on": True})
            off = await chaos.try_(COMPLETE, body)
            if off is not None and (not off.disabled or off.steered or not off.same_numbers(plain)):
                chaos.fault(f"steered although the kill switch is on: {off}")
            await _set(chaos, "PUT", "/v1/admin/kill-switch", {"on": False})
            await _set(chaos, "DELETE", "/v1/admin/default-spec")
    finally:
        over.set()
        await asyncio.gather(*watchers)


async def _set(chaos: Chaos, method: str, path: str, body: Body | None = None) -> None:
    response = await chaos.http.request(method, path, json=body)
    chaos.counts["flips"] += 1
    if response.status_code != 200:
        chaos.fault(f"{method} {path} got {response.status_code} {response.text[:200]}")


async def locked_database(chaos: Chaos) -> None:
    """Another process holds the library's lock: completions and health go on, writing says that it cannot."""
    await chaos.store()
    with chaos.server.locked_database():
        async with chaos.beside():
            for answer in await asyncio.gather(*(chaos.store() for _ in range(8 * chaos.amounts.size))):
                if answer is not None and answer.status not in (201, 503):
                    chaos.fault(f"an upload under a lock got {answer.status} {answer.code}")
            await chaos.truth(True, "a locked database")
        await _kill_switch_works(chaos)
    await _writes_again(chaos)


async def _kill_switch_works(chaos: Chaos) -> None:
    """In memory, whatever the library does."""
    steered = next(one for one in chaos.innocents.known if one.alone and one.alone.steered)
    await _set(chaos, "PUT", "/v1/admin/kill-switch", {"on": True})
    answer = await chaos.try_(steered.path, steered.body)
    if answer is not None and (answer.steered or not answer.disabled):
        chaos.fault(f"steered although the kill switch is on: {answer}")
    await _set(chaos, "PUT", "/v1/admin/kill-switch", {"on": False})
    await chaos.check(steered)


async def disk_full(chaos: Chaos) -> None:
    """Nothing fits any more: completions go on, writing says so, and what is stored stays readable."""
    await chaos.store()
    chaos.server.disk.fill(chaos.server.pid)
    try:
        async with chaos.beside():
            layers = chaos.innocents.num_layers
            for answer in await asyncio.gather(*(chaos.store(layers=layers) for _ in range(8 * chaos.amounts.size))):
                if answer is not None and (answer.status == 201 or answer.code is None):
                    chaos.fault(f"an upload onto a full disk got {answer.status} {answer.code}")
            await chaos.truth(True, "a full disk")
        await _kill_switch_works(chaos)
    finally:
        chaos.server.disk.free(chaos.server.pid)
    await _writes_again(chaos)


async def read_only(chaos: Chaos) -> None:
    """Nothing in the data folder may be written any more; what the server has open stays open."""
    if not chaos.server.disk.protects:
        chaos.notes.append("read_only: left out, nothing is read-only for root here")
        return
    await chaos.store()
    chaos.server.disk.write_protect(True)
    try:
        async with chaos.beside():
            for answer in await asyncio.gather(*(chaos.store() for _ in range(4))):
                if answer is not None and (answer.status == 201 or answer.code is None):
                    chaos.fault(f"an upload onto a read-only disk got {answer.status} {answer.code}")
            await chaos.truth(True, "a read-only disk")
    finally:
        chaos.server.disk.write_protect(False)
    await _writes_again(chaos)


async def _writes_again(chaos: Chaos) -> None:
    deadline = time.monotonic() + 60
    while (answer := await chaos.store()) is None or answer.status != 201:
        if time.monotonic() > deadline:
            chaos.fault(f"no upload works 60 s after it was over: {answer}")
            return
        await asyncio.sleep(0.5)
    await chaos.nothing_lost()


async def engine_fails(chaos: Chaos) -> None:
    """A step raises, then the engine ends: what ran gets its answer or a type, and it starts again by itself."""
    if chaos.server.engine == "transformers":
        # A step that raises is undone and computed again: nobody notices.
        async with chaos.beside():
            streams = await _streams(chaos)
            chaos.server.signal(signal.SIGUSR1)
            for answer in await asyncio.gather(*streams):
                if answer is not None and answer.code is not None:
                    chaos.fault(f"a stream of a step that raised ended with {answer.code}")
    async with chaos.beside(DOWN | BUSY):
        streams = await _streams(chaos)
        if chaos.server.engine == "vllm":
            chaos.server.engine_process().kill()
            await chaos.truth(False, "the engine was killed")
        else:
            chaos.server.signal(signal.SIGRTMIN)
        for answer in await asyncio.gather(*streams):
            if answer is not None and answer.code not in (None, *DOWN):
                chaos.fault(f"a stream of an engine that ended got {answer.code}")
        # Within this readiness has noticed.
        await asyncio.sleep(chaos.amounts.truth_s)
        await chaos.readiness.until(True, RESTART_S)


async def _streams(chaos: Chaos) -> list["asyncio.Task[Answer | None]"]:
    """Some that run for a while."""
    body = chaos.completion(stream=True, max_tokens=150, ignore_eos=True)
    streams = [asyncio.create_task(chaos.try_(COMPLETE, body)) for _ in range(4)]
    await asyncio.sleep(0.5)
    return streams


async def engine_stalls(chaos: Chaos) -> None:
    """The engine stops without a word, for longer than anyone waits."""
    if chaos.server.engine == "vllm":
        process = chaos.server.engine_process()
        process.suspend()
    else:
        chaos.server.signal(signal.SIGUSR2)
    stuck = asyncio.create_task(chaos.try_(COMPLETE, chaos.completion()))
    try:
        await chaos.readiness.until(False, chaos.amounts.stall_s)
        chaos.notes.append("engine_stalls: noticed")
    except TimeoutError:
        chaos.fault(f"a stalled engine is ready still after {chaos.amounts.stall_s:.0f} s")
    finally:
        if chaos.server.engine == "vllm":
            with suppress(Exception):
                process.resume()
        else:
            chaos.server.signal(signal.SIGUSR2)
    answer = await stuck
    if answer is not None and answer.code not in (None, *DOWN, *BUSY, "request_timeout"):
        chaos.fault(f"a request of a stalled engine got {answer.code}")


async def mixed(chaos: Chaos) -> None:
    """Requests of every kind, each alone and then all at once."""
    drawn = [chaos.innocents.draw() for _ in range(chaos.amounts.mixed)]
    alone = [await chaos.try_(one.path, one.body) for one in drawn]
    gate = asyncio.Semaphore(64)

    async def again(number: int) -> None:
        async with gate:
            answer = await chaos.try_(drawn[number].path, drawn[number].body)
        first = alone[number]
        chaos.counts["mixed"] += 1
        if answer is not None and first is not None and (answer.code or not answer.same_as(first)):
            chaos.fault(f"mixed is not alone: {drawn[number].path} {brief(drawn[number].body)}: {answer} {first}")

    await asyncio.gather(*(again(number) for number in range(len(drawn))))


async def mutated_files(chaos: Chaos) -> None:
    """Uploads of good files with bytes changed, cut and repeated: each is stored whole or refused, never a failure."""
    await chaos.store()
    good = await chaos.storing.files(chaos.http)
    async with chaos.beside(clients=1):
        for number in range(chaos.amounts.mutations):
            data = bytearray(good[number % len(good)])
            for _ in range(chaos.random.randint(1, 6)):
                at = chaos.random.randrange(len(data))
                match chaos.random.randrange(4):
                    case 0:
                        data[at] = chaos.random.randrange(256)
                    case 1:
                        del data[at:at + chaos.random.randint(1, 64)]
                    case 2:
                        data[at:at] = data[at:at + chaos.random.randint(1, 64)]
                    case _:
                        data[at:at + 8] = chaos.random.choice((b"\xff" * 8, bytes(8), b"\x7f" * 8))
                if not data:
                    break
            try:
                answer = read(await chaos.http.post(
                    "/v1/artifacts/import", params=import_query(number), content=bytes(data),
                    headers={"Content-Type": "application/octet-stream"}))
            except (Broken, httpx.HTTPError) as error:
                chaos.fault(f"mutated file {number}: {error!r}")
                continue
            chaos.counts["mutated files"] += 1
            if answer.status >= 500:
                chaos.fault(f"mutated file {number} got {answer.status} {answer.code}")


async def terminate(chaos: Chaos) -> None:
    """SIGTERM under load: everything open ends in a typed way, nothing is traced, and the exit code is 0."""
    offset = chaos.server.log.stat().st_size
    ended: list[str] = []

    async def request(stream: bool) -> None:
        body = chaos.completion(stream=stream, max_tokens=200, ignore_eos=True)
        try:
            async with asyncio.timeout(HANG_S):
                answer = await ask(chaos.http, COMPLETE, body)
            ended.append(answer.code or "whole")
        except httpx.ConnectError:
            ended.append("not taken any more")
        except (Broken, httpx.HTTPError, TimeoutError) as error:
            chaos.fault(f"a request was broken off by SIGTERM (stream={stream}): {error!r}")

    tasks = [asyncio.create_task(request(number % 2 == 0)) for number in range(16)]
    await asyncio.sleep(1)
    chaos.server.signal(signal.SIGTERM)
    try:
        code = await chaos.server.wait(chaos.amounts.drain_s)
        if code != 0:
            chaos.fault(f"exit code {code} after SIGTERM")
    except TimeoutError as error:
        chaos.fault(f"SIGTERM: {error}")
        await chaos.server.kill()
    await asyncio.gather(*tasks)
    chaos.counts.update(f"ended by SIGTERM: {how}" for how in ended)
    if "Traceback" in (said := chaos.server.written_since(offset)):
        chaos.fault(f"a traceback after SIGTERM: {said[said.index('Traceback'):][:1500]}")


async def kill_uploads(chaos: Chaos) -> None:
    """SIGKILL while several clients upload: what was acknowledged is there after the restart, number for number."""
    for _ in range(chaos.amounts.kills):
        goal = len(chaos.storing.acknowledged) + chaos.amounts.uploads // chaos.amounts.kills
        tasks = [asyncio.create_task(_upload_until_killed(chaos)) for _ in range(4)]
        deadline = time.monotonic() + HANG_S
        while len(chaos.storing.acknowledged) < goal and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        # Within the next uploads, of which all four are under way.
        await asyncio.sleep(chaos.random.random() * 0.05)
        await chaos.server.kill()
        await asyncio.gather(*tasks)
        await chaos.restart()
    chaos.counts["acknowledged uploads"] = len(chaos.storing.acknowledged)


async def _upload_until_killed(chaos: Chaos) -> None:
    with suppress(httpx.HTTPError):
        while True:
            await chaos.storing.store(chaos.http)


async def offloading(chaos: Chaos) -> None:
    """More tokens than a small cache holds: requests are put off and go on, also when those before them leave."""
    async with chaos.beside(clients=1):
        for _ in range(2 * chaos.amounts.size):
            tasks = [asyncio.create_task(leave_stream(chaos, 10**6, max_tokens=300)) for _ in range(3)]
            await asyncio.sleep(0.5 + chaos.random.random() * 2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


SCENARIOS: dict[str, Scenario] = {each.__name__: each for each in (
    poisonous_values, cancellations, slow_and_dead_clients, floods, switches, locked_database, disk_full, read_only,
    engine_fails, engine_stalls, mixed, mutated_files, terminate, kill_uploads, offloading)}
