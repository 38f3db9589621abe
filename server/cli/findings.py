"""What `trimtab doctor` looks at. Each check says what it found, and how to put it right."""

import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from server.settings import Settings, load_settings
from steering.language.errors import TrimtabError

DISTRIBUTION = "trimtab"


@dataclass(frozen=True)
class Finding:
    """fix: what to do; None if all is well."""

    subject: str
    found: str
    fix: str | None = None

    @property
    def good(self) -> bool:
        return self.fix is None


def check_python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("python", found, None if good else "Make the environment anew with Python 3.11 or newer.")


def check_packages() -> Iterator[Finding]:
    """Every package that the distribution asks for, against the version that is installed."""
    named = [Requirement(text) for text in requires(DISTRIBUTION) or []]
    wanted = [one for one in named if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = False
    for requirement in wanted:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            wrong = True
            yield Finding(requirement.name, found, f"Install {requirement}: pip install -c constraints.txt "
                                                   f"'{requirement}'")
    if not wrong:
        yield Finding("packages", f"all {len(wanted)} as asked for; torch {version('torch')}, transformers "
                                  f"{version('transformers')}, fastapi {version('fastapi')}")


def check_device() -> Iterator[Finding]:
    import torch

    accelerators = [name for name, there in (("cuda", torch.cuda.is_available()),
                                             ("mps", torch.backends.mps.is_available())) if there]
    yield Finding("device", f"{accelerators[0] if accelerators else 'cpu'}, {torch.get_num_threads()} CPU threads")


def check_settings() -> Iterator[Finding]:
    try:
        load_settings()
        yield Finding("settings", "valid")
    except TrimtabError as error:
        yield Finding("settings", f"{error.param}: {error.message}", error.fix or "Correct the setting.")


def check_library(settings: Settings) -> Iterator[Finding]:
    """Opens the library, which migrates it, and compares every stored blob with its digest."""
    from vectors.library import Library

    where = settings.database_url or str(settings.data_dir.absolute())
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        library = Library.open(settings.library_database_url, settings.library_blob_url)
    except (TrimtabError, OSError) as error:
        yield Finding("library", f"{where}: {error}", "Check TRIMTAB_DATA_DIR and TRIMTAB_DATABASE_URL, and who may "
                                                      "write there.")
        return
    try:
        damaged = library.damaged()
        if damaged:
            yield Finding("library", f"{where}: {len(damaged)} damaged artifacts: {', '.join(damaged[:5])}",
                          "Restore the blobs from a backup, or delete these artifacts.")
        else:
            yield Finding("library", where)
    finally:
        library.close()


def check_port(settings: Settings) -> Iterator[Finding]:
    try:
        with socket.create_server((settings.host, settings.port)):
            yield Finding("port", f"{settings.host}:{settings.port} is free")
    except OSError as error:
        yield Finding("port", f"{settings.host}:{settings.port}: {error.strerror or error}",
                      "Stop what listens there, or use another one: trimtab serve --port 8001.")


def check_model(settings: Settings) -> Iterator[Finding]:
    """Loads the model and starts it, which runs the self-test on every site."""
    import asyncio

    from server.engines.transformers.engine import TransformersEngine
    from server.engines.transformers.options import EngineOptions

    async def start() -> Finding:
        engine = TransformersEngine(EngineOptions(model=settings.model, model_id=settings.model_name,
                                                  device=settings.device, dtype=settings.dtype))
        await engine.start()
        try:
            missed = engine.selftest.missed if engine.selftest is not None else []
            sites = ", ".join(sorted(engine.facts.sites))
            return Finding("model", f"{settings.model_name} ({engine.facts.family}): sites {sites}",
                           f"Not reached and not offered: {missed}" if missed else None)
        finally:
            await engine.stop()

    try:
        yield asyncio.run(start())
    except (TrimtabError, OSError) as error:
        yield Finding("model", f"{settings.model}: {error}", "Name a model that is there: trimtab doctor lab-dense.")


def all_checks(settings: Settings, *, model: bool) -> list[Callable[[], Iterator[Finding]]]:
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python, check_packages, check_device, check_settings, lambda: check_library(settings),
        lambda: check_port(settings)]
    return [*checks, lambda: check_model(settings)] if model else checks

