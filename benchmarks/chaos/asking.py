"""Trouble that clients make: what they send, how they leave, and how many they are."""

import asyncio

import httpx

from benchmarks.chaos.chaos import BUSY, COMPLETE, HANG_S, Chaos
from benchmarks.chaos.clients import Said, half_request, leave_stream, slow_reader
from benchmarks.chaos.oracle import Body, Broken, brief, read
from benchmarks.chaos.poison import asked_in_every_way, raw_poisons, sampling_poisons, steering_poisons
from benchmarks.chaos.storing import import_query


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


async def offloading(chaos: Chaos) -> None:
    """More tokens than a small cache holds: requests are put off and go on, also when those before them leave."""
    async with chaos.beside(clients=1):
        for _ in range(2 * chaos.amounts.size):
            tasks = [asyncio.create_task(leave_stream(chaos, 10**6, max_tokens=300)) for _ in range(3)]
            await asyncio.sleep(0.5 + chaos.random.random() * 2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
