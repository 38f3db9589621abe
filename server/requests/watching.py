"""What a request watches: its monitors, and the limits of guards on what monitors read, looked up in the library."""

from server.requests.guard import HeldGuard
from server.requests.monitor import Limit, Monitor
from steering.language.errors import InvalidSpec, Path, TrimtabError
from steering.language.guard import Guard
from steering.language.watch import Watch
from steering.models.facts import ModelFacts
from steering.programs.reading import compile_reader
from vectors.library import Library


class Watching:
    def __init__(self, library: Library, facts: ModelFacts) -> None:
        self._library, self._facts = library, facts

    def monitor(self, watch: Watch, path: Path) -> Monitor:
        """Raises TrimtabError, as the library and `compile_reader`, about `path`."""
        try:
            source = self._library.source(watch.artifact)
            reader = compile_reader(source, self._facts, form=watch.form, layers=watch.layers,
                                    feature=watch.feature)
        except TrimtabError as error:
            own = error.path[0] if error.path else None
            raise (error.at(*path) if own in ("form", "layers", "feature") else error.about(*path)) from None
        return Monitor.of(reader, source.reading, form=watch.form, trend=watch.trend)

    def held(self, guard: Guard, path: Path) -> HeldGuard:
        """The guard with what it reads. Raises TrimtabError about `path`."""
        limits = []
        for i, limit in enumerate(guard.monitor):
            watch = Watch(artifact=limit.artifact, form=limit.form, feature=limit.feature)
            monitor = self.monitor(watch, (*path, "monitor", i))
            threshold = limit.threshold if limit.threshold is not None else monitor.threshold
            if threshold is None:
                raise InvalidSpec(f"{limit.artifact} records no threshold for the form {monitor.reader.form}",
                                  param=(*path, "monitor", i, "threshold"), fix="Give one.")
            limits.append(Limit(monitor, threshold))
        return HeldGuard(guard, tuple(limits))
