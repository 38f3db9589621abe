"""What a request costs before it reaches the engine: planning its steering, and the library behind it.

    python -m benchmarks.submit [--artifacts 100000] [--times 2000] [--json FILE]

A SQLite library is generated with so many artifacts of 4096 numbers, each with a description and three tags. Then, many
times each: a spec that names one of a thousand artifacts in turn is planned; a preset and the default spec are; a new
inline vector of 4096 numbers is; references are resolved; the library is listed and searched, in the worst case for a
word that is nowhere. The control is the same planning in a library that counts as changed before every request, so that
all of it is read from the database; it shows what the memory is worth. Times are medians and 95th percentiles of the
wall clock, with the median of the thread's own time beside them, as other work shares the machine.
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert, select

from benchmarks.command import options_of, run
from server.activations.store import StoredActivations
from server.observability.instruments import Registry
from server.requests.killswitch import KillSwitch
from server.requests.planner import Planner
from server.settings import Settings
from steering.artifacts.payload import Payload
from steering.language.spec import Spec, Steering
from steering.models.facts import ModelFacts
from vectors import Filter, Library, Metadata
from vectors.library.listing import relist
from vectors.library.tables import ArtifactRow, Listing, Named, Tag, Version

WIDTH, LAYERS, NAMES = 4096, 32, 1000
WORDS = ("mood", "calm", "angry", "style", "refusal", "french", "lab", "dense", "vector", "probe", "tone", "short")
FACTS = ModelFacts(model_id="bench", fingerprint="0" * 64, family="llama", num_layers=LAYERS, d_model=WIDTH,
                   num_heads=32, head_dim=128, d_ff=11008, vocab_size=32000, context_length=4096,
                   sites={"resid_post": tuple(range(LAYERS))})


def fill(library: Library, count: int) -> None:
    """Artifacts a0 to a<count - 1>, all of them with the numbers of the first."""
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    library.create(Metadata.parse({"name": "a0", "kind": "vector", "op": "add", "site": "resid_post",
                                   "description": "the first one", "tags": list(WORDS[:3])}),
                   Payload.build("vector", {10: {"vector": vector}}))
    draw = random.Random(0)

    def work(session: Any) -> None:
        first = session.scalars(select(ArtifactRow)).one()
        columns = {c.name: getattr(first, c.name) for c in ArtifactRow.__table__.columns if c.name != "version_id"}
        listed = session.scalars(select(Listing)).one()
        told = {"kind": listed.kind, "op": listed.op, "site": listed.site, "collection": "artifact"}
        for start in range(1, count, 2000):
            numbers = range(start, min(start + 2000, count))
            texts = {n: (" ".join(draw.choices(WORDS, k=20)), draw.sample(WORDS, 3)) for n in numbers}
            session.execute(insert(Named), [{"id": n + 1, "collection": "artifact", "name": f"a{n}", "last_number": 1}
                                            for n in numbers])
            session.execute(insert(Version), [{"id": n + 1, "named_id": n + 1, "number": 1, "digest": f"{n:064}"}
                                              for n in numbers])
            session.execute(insert(ArtifactRow), [
                {**columns, "version_id": n + 1, "description": texts[n][0],
                 "document": first.document.replace('"a0"', f'"a{n}"')} for n in numbers])
            session.execute(insert(Tag), [{"version_id": n + 1, "tag": tag, "position": place}
                                          for n in numbers for place, tag in enumerate(texts[n][1])])
            session.execute(insert(Listing), [
                {**told, "name": f"a{n}", "named_id": n + 1, "version_id": n + 1, "tags": "\n".join(["", *tags, ""]),
                 "text": "\n".join([f"a{n}", text, *tags])} for n, (text, tags) in texts.items()])
        # As the library itself would have it.
        relist(session, "artifact", f"a{count - 1}")

    library._database.write(work)


def timed(work: Callable[[Any], Any], given: Iterator[Any], times: int) -> dict[str, float]:
    """Milliseconds. What is given to `work` is made outside of the time."""
    walls, owns = [], []
    for one in itertools.islice(given, times):
        own, wall = time.thread_time(), time.perf_counter()
        work(one)
        walls.append(time.perf_counter() - wall)
        owns.append(time.thread_time() - own)
    return {"median_ms": statistics.median(walls) * 1e3, "p95_ms": statistics.quantiles(walls, n=20)[-1] * 1e3,
            "own_ms": statistics.median(owns) * 1e3}


def steering(**fields: Any) -> Steering:
    return Steering.model_validate(fields)


def named() -> Iterator[Steering]:
    for n in itertools.cycle(range(NAMES)):
        yield steering(interventions=[{"artifact": f"a{n}", "strength": 2.0}])


def inline() -> Iterator[Steering]:
    generator = torch.Generator().manual_seed(2)
    while True:
        yield steering(interventions=[{"op": "add", "layers": [10], "inline": {
            "vector": torch.randn(WIDTH, generator=generator).tolist()}}])


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = Library.open(f"sqlite:///{folder}/library.db", f"{folder}/blobs")
        fill(library, arguments.artifacts)
        library.presets.create("calm", Spec.model_validate({"interventions": [{"artifact": "a5"}]}))
        settings = Settings(data_dir=Path(folder))
        captured = StoredActivations(Path(folder) / "activations", most_bytes=settings.activations_bytes,
                                     seconds=settings.activations_kept_s)
        planner = Planner(settings, library, FACTS, KillSwitch(library.switches, Registry(), always=False), captured)

        def plan(given: Steering) -> None:
            assert planner.plan(given, None).program is not None

        times = arguments.times
        timed(plan, named(), NAMES)
        found["plan a named artifact"] = timed(plan, named(), times)
        found["plan a preset"] = timed(plan, itertools.repeat(steering(preset="calm")), times)
        found["plan a new inline vector"] = timed(plan, inline(), min(times, 500))
        library.switches.set_default_spec(Spec.model_validate({"interventions": [{"artifact": "a7"}]}))
        timed(plan, named(), NAMES)
        found["plan a named artifact and the default spec"] = timed(plan, named(), times)
        found["plan the same, all of it read from the database (control)"] = timed(
            plan, changing(library, named()), min(times, 500))
        refs = [f"a{n}" for n in random.Random(1).sample(range(arguments.artifacts), min(NAMES, arguments.artifacts))]
        for ref in refs:
            library.source(ref)
        found[f"resolve one of {arguments.artifacts}"] = timed(library.source, itertools.cycle(refs), times * 5)
        found["resolve, read from the database (control)"] = timed(
            library.source, changing(library, itertools.cycle(refs)), min(times, 500))
        pages: dict[str, dict[str, Any]] = {
            "list by name": {}, "list by age, newest first": {"order": "-created"},
            "list of a tag": {"filter": Filter(tag="calm")},
            "list of a kind that is nowhere": {"filter": Filter(kind="probe")},
            "search, found often": {"filter": Filter(q="angry calm")},
            "search by age, found often": {"filter": Filter(q="calm"), "order": "created"},
            "search, found nowhere": {"filter": Filter(q="zebra")},
            "search by age, found nowhere": {"filter": Filter(q="zebra"), "order": "-created"}}
        for name, options in pages.items():
            found[name] = timed(lambda given: library.list(**given), itertools.repeat(options), min(times, 100))
        library.close()
    return report(found, arguments)


def changing(library: Library, given: Iterator[Any]) -> Iterator[Any]:
    """As given, with the library changed before each."""
    revision = library._database.revision
    for one in given:
        revision.wrote(revision.current() + 1)
        yield one


def report(found: dict[str, dict[str, float]], arguments: argparse.Namespace) -> dict[str, Any]:
    table = Table("what", "median ms", "p95 ms", "own time, median ms", box=None)
    for name, row in found.items():
        table.add_row(name, *(f"{row[column]:.3f}" for column in ("median_ms", "p95_ms", "own_ms")))
    Console(width=120).print(table)
    return {"artifacts": arguments.artifacts, "times": arguments.times, "rows": found}


if __name__ == "__main__":
    parser = options_of(__doc__)
    parser.add_argument("--artifacts", type=int, default=100_000)
    parser.add_argument("--times", type=int, default=2000)
    run(parser, main)
