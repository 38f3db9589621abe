"""Trouble with what the library keeps: switches that flip, a lock, a full disk, one that cannot be written, a kill."""

import asyncio
import time
from contextlib import suppress

import httpx

from benchmarks.chaos.chaos import COMPLETE, HANG_S, Chaos
from benchmarks.chaos.oracle import Body


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
