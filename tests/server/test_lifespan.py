"""Whatever a part of the server raises when it starts or stops, the others are stopped."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from server.background.housekeeping import Housekeeping
from server.background.jobs import Jobs
from server.effects.shadow import Shadow
from server.effects.store import EffectStore
from server.engines.data import Condition
from server.requests.killswitch import KillSwitch
from tests.server.scripted import ScriptedEngine
from vectors.library import Library

PARTS: dict[str, Any] = {"engine": ScriptedEngine, "kill switch": KillSwitch, "shadow": Shadow, "jobs": Jobs,
                         "housekeeping": Housekeeping, "store": EffectStore, "library": Library}
ORDER = ["housekeeping", "jobs", "shadow", "kill switch", "store", "engine", "library"]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of parts in the order in which they were stopped."""
    names: list[str] = []

    def noting(name: str, method: Any) -> Any:
        if name in ("store", "library"):
            def close(self: Any) -> None:
                names.append(name)
                method(self)

            return close

        async def stop(self: Any) -> None:
            names.append(name)
            await method(self)

        return stop

    for name, owner in PARTS.items():
        method = "close" if name in ("store", "library") else "stop"
        monkeypatch.setattr(owner, method, noting(name, getattr(owner, method)))
    yield names


async def failing(*args: Any) -> None:
    raise OSError("not this one")


async def test_all_are_stopped_the_last_one_first(app: FastAPI, ended: list[str]) -> None:
    async with app.router.lifespan_context(app):
        assert ended == []
    assert ended == ORDER


@pytest.mark.parametrize("name", ["engine", "kill switch", "shadow", "housekeeping"])
async def test_a_start_that_fails_stops_what_was_started(app: FastAPI, ended: list[str], engine: ScriptedEngine,
                                                       monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(PARTS[name], "start", failing)
    with pytest.raises(OSError, match="not this one"):
        async with app.router.lifespan_context(app):
            raise AssertionError("it serves")
    assert ended == ORDER[ORDER.index(name):]
    assert engine.condition() == Condition(ready=False, reason="stopped")


@pytest.mark.parametrize("name", ["jobs", "shadow", "kill switch", "engine", "housekeeping"])
async def test_a_stop_that_fails_stops_the_others_all_the_same(app: FastAPI, ended: list[str],
                                                             monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    noted = getattr(PARTS[name], "stop")  # noqa: B009

    async def stop(self: Any) -> None:
        await noted(self)
        raise OSError("not this one")

    monkeypatch.setattr(PARTS[name], "stop", stop)
    with pytest.raises(OSError, match="not this one"):
        async with app.router.lifespan_context(app):
            pass
    assert ended == ORDER


async def test_so_does_one_whose_files_cannot_be_read(app: FastAPI, ended: list[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Jobs) -> None:
        raise PermissionError("jobs")

    monkeypatch.setattr(Jobs, "load", unreadable)
    with pytest.raises(PermissionError):
        async with app.router.lifespan_context(app):
            raise AssertionError("it serves")
    assert ended == ORDER[1:]
