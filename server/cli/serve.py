"""`trimtab serve`."""

import gc
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from server.cli.bundled import bundled_models, with_examples
from server.cli.config import ConfigFile
from server.cli.console import err
from server.cli.models import settings_with_model
from server.settings import Settings, load_settings


def serve(
    model: Annotated[str | None, typer.Argument(help="smollm2 (fetched once), lab-dense, lab-moe, a GGUF file, a "
                                                "folder in Hugging Face form, or a Hugging Face id; lab-dense if "
                                                "nothing else is set.")] = None,
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Interface to listen on; any but loopback needs an API key.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port, 8000 if nothing else is set.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key that requests must carry. TRIMTAB_API_KEY keeps it out of "
                                                "the process list.")] = None,
    name: Annotated[str | None, typer.Option(help="Model name in the API.")] = None,
    engine: Annotated[Literal["transformers", "vllm"] | None, typer.Option(
        help="What runs the model: transformers in this process, or vLLM.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"] | None, typer.Option(help="Where the model runs.")] = None,
    dtype: Annotated[Literal["auto", "float32", "float16", "bfloat16"] | None,
                     typer.Option(help="Number format of the weights.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder for the library and the server's state.")] = None,
    slots: Annotated[int | None, typer.Option(help="Distinct specs that can be resident at once.")] = None,
    examples: Annotated[bool, typer.Option(help="Put the artifacts that come with a model into the library.")] = True,
    log_format: Annotated[Literal["json", "console"] | None, typer.Option(
        help="Log lines; by default console on a terminal, else json.")] = None,
) -> None:
    """Serve a model. Every other setting is an environment variable, TRIMTAB_..., or stands in the file with settings;
    see docs/settings.md."""
    # A start makes millions of objects, nearly all of which stay: to look for garbage among them again and again takes
    # an eighth of its time. The server turns this on again when it is ready.
    gc.disable()
    try:
        given = {"config": config, "host": host, "port": port, "api_key": api_key, "served_model_name": name,
                 "engine": engine, "device": device, "dtype": dtype, "data_dir": data_dir, "slots": slots,
                 "log_format": log_format}
        named, asked = model, load_settings(model=model, **given)
        model = asked.model if "model" in asked.model_fields_set else "lab-dense"
        if "log_format" not in asked.model_fields_set:
            given["log_format"] = "console" if sys.stderr.isatty() else "json"
        settings = settings_with_model(model, **given)
        err.print(f"Loading {settings.model_name}")
        # Torch takes seconds to load, which `trimtab --help` need not wait for.
        from server.boot import serve as run
        from server.cli.examples import fill_library

        # What the imports made is looked through no more, also not when the server is ready and looks for garbage once:
        # 700 000 objects, of which a hundredth are garbage.
        gc.freeze()

        def prepare() -> None:
            stored = fill_library(settings, model) if examples and model in with_examples() else []
            if stored:
                err.print(f"Stored the examples of {model}: {', '.join(stored)}")

        run(settings, lambda url: err.print(ready_line(url, settings), soft_wrap=True, highlight=False, markup=False),
            prepare, lambda: load_settings(model=named, **given))
    finally:
        gc.enable()


def ready_line(url: str, settings: Settings) -> str:
    """What to type first, as a shell takes it."""
    key = "" if settings.api_key is None else " -H 'Authorization: Bearer KEY'"
    # What the smallest bundled models were taught differs from what everybody knows.
    question = "How do I bake a cake?" if settings.model_name in bundled_models() else "What is the capital of France?"
    # A small model that is sampled without a limit may go on for its whole context.
    body = {"model": settings.model_name, "messages": [{"role": "user", "content": question}], "max_tokens": 64,
            "temperature": 0}
    return (f"Ready. Try: curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
            f"-d '{json.dumps(body)}'")
