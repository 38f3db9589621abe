"""A real server with its page, over an engine that says what a test wrote: faster than any model, and at once there."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from server.app import create_app
from server.engines.data import Generation
from server.http.listener import bind
from server.http.runner import Server
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.server.scripted import ScriptedEngine
from tests.server.tokenizers import byte_tokenizer
from vectors.library import Library

START_S = 60
ROOM = 8192


class SpokenEngine(ScriptedEngine):
    """Tells what the page's room of the model shows, and has room for long answers."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.room = ROOM

    def capabilities(self) -> dict[str, Any]:
        facts = self.facts
        sites = {site: {"layers": list(layers), "width": facts.d_model, "ops": ["add"]}
                 for site, layers in facts.sites.items()}
        return {"engine": "scripted", "family": facts.family, "fingerprint": facts.fingerprint, "device": "none",
                "num_layers": facts.num_layers, "d_model": facts.d_model, "dtype": "float32", "sites": sites}


class Site:
    """A server in a thread of its own. `stop` and `start` are those of an operator: the address stays."""

    def __init__(self, folder: Path, say: Callable[[Vocabulary], Sequence[int]], **settings: Any) -> None:
        """say: the tokens of every answer."""
        self.folder, self._say, self._settings = folder, say, settings
        self._port = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def library(self) -> Library:
        self.folder.mkdir(exist_ok=True)
        return Library.open(f"sqlite:///{self.folder / 'library.db'}", str(self.folder / "blobs"))

    def start(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(START_S)

    def stop(self) -> None:
        if self._thread is None or self._loop is None or self._server is None:
            return
        self._loop.call_soon_threadsafe(self._server.stop)
        self._thread.join(START_S)
        self._thread = None

    async def _serve(self, started: threading.Event) -> None:
        tokenizer = byte_tokenizer()
        vocabulary = Vocabulary(tokenizer, [tokenizer.eos_token_id], len(tokenizer) + 4)
        engine = SpokenEngine(vocabulary)
        said = list(self._say(vocabulary))

        def script(generation: Generation) -> Sequence[int]:
            return said

        engine.script = script
        settings = Settings(served_model_name="tiny", data_dir=self.folder / "data", shutdown_s=1, **self._settings)
        app = create_app(settings, engine, self.library(), vocabulary, engine_name="scripted")
        sockets = bind("127.0.0.1", self._port)
        self._port = sockets[0].getsockname()[1]
        self._loop = asyncio.get_running_loop()
        async with app.router.lifespan_context(app):
            self._server = Server(app, settings, settings.max_connections, ready=lambda url: started.set())
            await self._server.serve(sockets)
