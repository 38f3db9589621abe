"""`trimtab verify` from settings to a report: the engine first, then, in its place, the plain model that judges it."""

import gc
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.boot import load_engine
from server.engines.base import Engine
from server.engines.data import CaptureRequest
from server.settings import Settings
from server.threads import in_thread
from server.verify import effect, overhead
from server.verify.cases import make_cases
from server.verify.exactness import TOLERANCE, compare, mixed_batches
from server.verify.hooks import check_places
from server.verify.overhead import Arm, Stock
from server.verify.report import Report
from steering.language.errors import UnsupportedModel

# Of different lengths, so that the requests of a batch are at different positions.
TEXTS = ("The old lighthouse stood on a cliff above the grey sea, and nobody in the village",
         "In order to repair the engine of a car you first have to",
         "She opened the letter slowly. It had been sent from a town that she had never heard of, by a man who",
         "Prices rose again last month, as the bank had")
# Seconds that the rounds of the overhead may go on for; three rounds are run in any case.
OVERHEAD_S = 150.0


async def verify(settings: Settings, said: Callable[[str], None], *, with_overhead: bool = True) -> Report:
    """Prove one model on one engine on this machine.

    Args:
        said: told what is being done, now and then.

    Raises:
        TrimtabError: the engine does not start, or there is no reference for this model.
    """
    began = time.monotonic()
    settings = _roomy(settings, with_overhead)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text))

    said("Starting the engine")
    engine = load_engine(settings)
    await engine.start()
    try:
        where = _where(engine, settings)
        # A start in half precision says "auto" where it takes the checkpoint's own format.
        dtype = _dtype(engine, settings)
        prompts = [encode(text) for text in TEXTS]
        offered = engine.capabilities()["sites"]
        cases = make_cases(engine.facts, offered, await seen_by(engine, offered, prompts[0]))
        said(f"Asking for {len(cases)} different things in one batch, twice")
        answers = await mixed_batches(engine, cases, prompts)
        said("Measuring the effect of a vector and of random ones")
        layer, runs = await effect.measure(engine, encode)
        arms: dict[str, Arm] | None = None
        if with_overhead:
            said("Taking turns with the stock engine")
            arms = await _overhead(engine, settings, dtype)
    finally:
        await engine.stop()
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    said("Comparing with plain Hugging Face hooks, in float32")
    model = await in_thread(_reference, settings)
    check_places(model, prompts[0])
    exact = [await in_thread(compare, model, case, given, TOLERANCE[dtype])
             for case, given in zip(cases, answers, strict=True)]
    measured = await in_thread(effect.checked, model, layer, runs, dtype)
    return Report(where | {"dtype": dtype}, exact, arms, measured, time.monotonic() - began)


def _roomy(settings: Settings, with_overhead: bool) -> Settings:
    """On a GPU two engines of vLLM share its memory, of which each would take nearly all by itself."""
    if settings.engine != "vllm" or not with_overhead or not torch.cuda.is_available():
        return settings
    return settings.model_copy(update={"vllm_args": {"gpu_memory_utilization": 0.4, **settings.vllm_args}})


def _where(engine: Engine, settings: Settings) -> dict[str, Any]:
    about = engine.capabilities()
    cuda = torch.cuda.is_available() and about["device"] == "cuda"
    packages = ("trimtab", "torch", "transformers", *(["vllm"] if settings.engine == "vllm" and cuda else []))
    return {"model": settings.model_name, "family": engine.facts.family, "engine": settings.engine,
            "device": torch.cuda.get_device_name() if cuda else about["device"],
            "threads": torch.get_num_threads(), "versions": {name: version(name) for name in packages}}


def _dtype(engine: Engine, settings: Settings) -> str:
    dtype = str(engine.capabilities()["dtype"]).removeprefix("torch.")
    if dtype == "auto":
        from transformers import AutoConfig

        dtype = str(AutoConfig.from_pretrained(settings.model).dtype).removeprefix("torch.")
    if dtype not in TOLERANCE:
        raise UnsupportedModel(f"there is no tolerance for {dtype}", param="dtype",
                               fix=f"Use one of {', '.join(TOLERANCE)}.")
    return dtype


async def seen_by(engine: Engine, offered: Mapping[str, Any], token_ids: list[int]) -> Callable[[str, int], Tensor]:
    """Activations of one text. The first token is left out, whose activation is many times larger in most models."""
    layers = {site: list(about["layers"]) for site, about in offered.items() if about["layers"]}
    found = (await engine.capture([CaptureRequest(token_ids, layers)]))[0]  # type: ignore[arg-type]
    return lambda site, layer: found[site][layer][1:].float()  # type: ignore[index]


async def _overhead(engine: Engine, settings: Settings, dtype: str) -> dict[str, Arm]:
    stock = _stock(engine, settings, dtype)
    await stock.start()
    try:
        return await overhead.measure(engine, stock, time.monotonic() + OVERHEAD_S)
    finally:
        await stock.stop()


def _stock(engine: Any, settings: Settings, dtype: str) -> Stock:
    if settings.engine == "vllm":
        from server.engines.vllm.host.config import engine_arguments
        from server.verify.stock_vllm import StockVllm

        ours = ("additional_config", "scheduling_policy", "compilation_config")
        given = engine_arguments(engine.options, engine.reading)
        return StockVllm(**{name: value for name, value in given.items() if name not in ours})
    from server.verify.stock_transformers import StockTransformers

    options = engine.options
    return StockTransformers(options.model, getattr(torch, dtype), engine.model.device, page_size=options.page_size,
                             num_blocks=max(1, -(-options.kv_cache_tokens // options.page_size)),
                             max_batch_tokens=options.max_batch_tokens,
                             max_requests_per_batch=min(options.max_requests, options.max_batch_tokens))


def _reference(settings: Settings) -> Any:
    """The model as transformers has it, in float32, on a GPU where there is one."""
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu").eval()
