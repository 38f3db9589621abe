"""SIGKILL at random instants during uploads: nothing acknowledged is lost, nothing half-visible remains."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

from steering.artifacts.payload import Payload
from tests.vectors.making import metadata, open_library, same_numbers, vector_payload

ROUNDS = 15
SEEDS = 1000


def _upload_for_ever(folder: str, first_seed: int, acknowledge: int) -> None:
    """Uploads until killed, and reports each upload once the library has returned it."""
    library = open_library(Path(folder))
    os.write(acknowledge, b"\n")
    for seed in range(first_seed, first_seed + 10**6):
        # Large enough that a kill lands within the writing of a blob now and then.
        artifact = library.create(metadata(f"n{seed % 3}", tags=["uploaded"]), _payload(seed))
        library.set_alias(f"n{seed % 3}", "production", artifact.version)
        line = json.dumps([artifact.metadata.name, artifact.version, artifact.digest, seed])
        os.write(acknowledge, line.encode() + b"\n")


def _payload(seed: int) -> Payload:
    return vector_payload(seed, layers=tuple(range(6)), width=1024)


def _round(folder: Path, first_seed: int, chance: random.Random) -> list[tuple[str, int, str, int]]:
    """One uploader, killed somewhere within an upload after a few; what it acknowledged."""
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_upload_for_ever,
                                                          args=(str(folder), first_seed, writer))
    process.start()
    os.close(writer)
    assert process.pid is not None
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.readline() == b"\n"
        lines, started = [], time.monotonic()
        for _ in range(chance.randrange(5)):
            lines.append(pipe.readline())
        # The kill falls within the next upload, at the pace of this machine.
        pace_s = (time.monotonic() - started) / len(lines) if lines else 0.05
        time.sleep(chance.random() * pace_s)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lines += pipe.read().splitlines(keepends=True)
    assert process.exitcode == -signal.SIGKILL
    return [tuple(json.loads(line)) for line in lines if line.endswith(b"\n")]


def test_killed_uploads_lose_nothing_and_leave_nothing_half_done(tmp_path: Path) -> None:
    chance = random.Random(2026)
    acknowledged: dict[tuple[str, int], tuple[str, int]] = {}
    for number in range(ROUNDS):
        made = _round(tmp_path, number * SEEDS, chance)
        for name, version, digest, seed in made:
            assert (name, version) not in acknowledged, "a version number was given out twice"
            acknowledged[name, version] = (digest, seed)

        library = open_library(tmp_path)
        seen = {}
        for artifact in library.list().items:
            for every in library.versions(artifact.metadata.name):
                seen[every.metadata.name, every.version] = every
        for key, (digest, seed) in acknowledged.items():
            assert seen[key].digest == digest
            assert seen[key].metadata.tags == ("uploaded",)
            if seed // SEEDS == number:
                assert same_numbers(library.payload(seen[key]), _payload(seed))
        # What was stored but not yet acknowledged is there whole, and no alias hangs in the air.
        assert library.damaged() == []
        for name in {name for name, _ in seen}:
            versions = sorted(version for other, version in seen if other == name)
            assert versions == list(range(1, len(versions) + 1))
            assert library.resolve(name).version in versions
        library.close()
    assert len(acknowledged) > ROUNDS

    library = open_library(tmp_path)
    library.gc(min_age_s=-1)
    blobs = {path.stem for path in (tmp_path / "blobs").rglob("*") if path.is_file()}
    referenced = {every.digest for artifact in library.list().items
                  for every in library.versions(artifact.metadata.name)}
    assert blobs == referenced
    assert library.damaged() == []
