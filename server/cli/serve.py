"""`trimtab serve`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from server.cli.bundled import bundled_models, locate_model
from server.cli.console import err
from server.settings import load_settings


def serve(
    model: Annotated[str, typer.Argument(envvar="TRIMTAB_MODEL", help="lab-dense, lab-moe, a folder with a model in "
                                         "Hugging Face form, or a Hugging Face id.")] = "lab-dense",
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
    examples: Annotated[bool, typer.Option(help="Put a bundled model's example artifacts into the library.")] = True,
    log_format: Annotated[Literal["json", "console"] | None, typer.Option(
        help="Log lines; by default console on a terminal, else json.")] = None,
) -> None:
    """Serve a model. Every other setting is an environment variable, TRIMTAB_..., see docs/settings.md."""
    if log_format is None and "TRIMTAB_LOG_FORMAT" not in os.environ:
        log_format = "console" if sys.stderr.isatty() else "json"
    settings = load_settings(
        model=locate_model(model), host=host, port=port, api_key=api_key, served_model_name=name, engine=engine,
        device=device, dtype=dtype, data_dir=data_dir, slots=slots, log_format=log_format)
    err.print(f"Loading {settings.model_name}; it will answer on http://{settings.host}:{settings.port}/v1")
    # Torch takes seconds to load, which `trimtab --help` need not wait for.
    from server.boot import serve as run
    from server.cli.examples import fill_library

    if examples and model in bundled_models():
        stored = fill_library(settings, model)
        if stored:
            err.print(f"Stored the examples of {model}: {', '.join(stored)}")
    run(settings)
