"""From settings to a running server: loads the model, opens the library, makes the app."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import structlog
from fastapi import FastAPI
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from server.app import create_app
from server.engines.base import Engine
from server.engines.generation_config import SamplingDefaults, defaults_of
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from server.engines.vllm.host.options import VllmOptions
from server.http.listener import bind
from server.http.runner import run
from server.http.tls import check_certificates
from server.observability.logs import configure_logging
from server.settings import Settings
from server.starting import check_model, prepare_data_dir, said
from server.text.vocabulary import Vocabulary
from steering.acting.containment import StepLimit
from vectors.artifact import Limits
from vectors.library import Library

log = structlog.get_logger("trimtab.server")
Options = TypeVar("Options", EngineOptions, VllmOptions)


def build(settings: Settings, again: Callable[[], Settings] | None = None) -> FastAPI:
    """The app. Loads the model; the engine starts with the app. `again`: reads the settings again."""
    prepare_data_dir(settings)
    check_model(settings.model)
    library = Library.open(settings.library_database_url, settings.library_blob_url,
                           Limits(payload_bytes=settings.max_upload_bytes,
                                  library_bytes=settings.library_bytes or None,
                                  library_names=settings.library_names or None,
                                  library_versions=settings.library_versions or None),
                           wait_s=settings.database_wait_s, connections=settings.database_connections)
    with said(f"the model {settings.model} cannot be loaded", param="model",
              fix="Give a model whose files are whole and in a form that this engine reads."):
        engine = load_engine(settings)
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    end_ids = [*engine.end_ids, tokenizer.eos_token_id]
    vocabulary = Vocabulary(tokenizer, [i for i in end_ids if i is not None], engine.facts.vocab_size)
    defaults = defaults_of(settings.model) if settings.generation_config == "auto" else SamplingDefaults()
    return create_app(settings, engine, library, vocabulary, engine_name=settings.engine, again=again,
                      sampling_defaults=defaults)


def load_engine(settings: Settings) -> Engine:
    """The engine that the settings ask for, not started yet."""
    own = {"cache_dir": settings.cache_folder, "kept_bytes": settings.effects_kept_bytes}
    if settings.engine == "vllm":
        # vLLM is an extra and takes seconds to import.
        from server.engines.vllm.host.engine import VllmEngine

        return VllmEngine(options_from(settings, VllmOptions, extra=settings.vllm_args, **own))
    return TransformersEngine(options_from(settings, EngineOptions, **own))


def options_from(settings: Settings, kind: type[Options], **own: Any) -> Options:
    """Options of an engine. A field that is not in `own` takes the setting of its name, which may begin with `vllm_` or
    `engine_`; fields that no setting is for keep their defaults."""
    own |= {"model_id": settings.model_name, "slots": settings.num_slots,
            "step_limit": StepLimit.of(settings.step_limit, settings.step_limit_action)}
    for field in fields(kind):
        found = [name for name in (f"vllm_{field.name}", f"engine_{field.name}", field.name)
                 if name in Settings.model_fields]
        if found and field.name not in own:
            own[field.name] = getattr(settings, found[0])
    return kind(**own)


def serve(settings: Settings, ready: Callable[[str], None] = lambda url: None,
          prepare: Callable[[], None] = lambda: None, again: Callable[[], Settings] | None = None) -> None:
    """Serve until told to stop.

    Args:
        ready: called with the base URL as soon as requests are answered.
        prepare: called before the model loads, once port and data folder are known to be usable.
        again: reads the settings again as they were read for this start.

    Raises:
        InvalidSettings, CannotStart: for what the operator got wrong, before anything was served.
    """
    configure_logging(settings.log_format)
    with ExitStack() as opened:
        # Before the model loads: a port that is taken is noticed at once.
        sockets = [opened.enter_context(sock) for sock in bind(settings.host, settings.port)]
        check_certificates(settings)
        prepare_data_dir(settings)
        check_model(settings.model)
        prepare()
        # A bar of its own for each part of a load; ours says what there is to say.
        disable_progress_bar()
        if not Path(settings.model).exists():
            log.info("the model is no local folder, taking it for a Hugging Face id", model=settings.model)
        run(build(settings, again), settings, sockets, ready)
