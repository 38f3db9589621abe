"""What Trimtab must know of a model before vLLM loads it: facts, fingerprint, end-of-text tokens."""

import gc
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from server.engines.checkpoint import KnownFingerprints
from server.engines.vllm.host.options import VllmOptions
from steering.language.errors import UnsupportedModel
from steering.models.describe import model_facts
from steering.models.facts import ModelFacts
from steering.models.families import FAMILIES
from steering.models.fingerprints import fingerprint


@dataclass(frozen=True)
class ModelReading:
    """facts: with every site that the structure offers. end_ids: end-of-text tokens of the generation config."""

    facts: ModelFacts
    end_ids: tuple[int, ...]
    kv_bytes_per_token: int


def read_model(options: VllmOptions) -> ModelReading:
    """Read the structure as transformers has it, and the weights only if the checkpoint's fingerprint is not known yet.

    Raises:
        UnsupportedModel: no model that transformers can load, a family whose blocks are not hooked in vLLM, or a model
            that asks for what vLLM leaves out.
    """
    known = KnownFingerprints(options.cache_dir)
    try:
        found = known.get(options.model)
        model: Any = _loaded(options.model) if found is None else _structure(options.model)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"cannot load {options.model}: {str(error).strip().splitlines()[0]}",
                               param="model") from error
    if found is None:
        found = fingerprint(model)
        known.keep(options.model, found)
    facts = model_facts(model, model_id=options.model_id, fingerprint=found)
    family = FAMILIES[facts.family]
    if family.vllm is None:
        steered = ", ".join(name for name, other in FAMILIES.items() if other.vllm is not None)
        raise UnsupportedModel(f"the vLLM engine does not steer {facts.family}", param="model",
                               fix=f"Known there: {steered}. The embedded engine knows more.")
    config = model.config
    for name in family.vllm.ignored:
        if getattr(config, name, None):
            raise UnsupportedModel(f"{options.model_id} asks for {name}, which vLLM does not do for {facts.family}",
                                   param="model", fix="Serve it with the embedded engine.")
    ends = model.generation_config.eos_token_id
    kv_heads = getattr(config, "num_key_value_heads", None) or facts.num_heads
    size = 4 if options.dtype in ("auto", "float32") else 2
    reading = ModelReading(facts, tuple(ends if isinstance(ends, list) else [] if ends is None else [ends]),
                           2 * facts.num_layers * kv_heads * facts.head_dim * size)
    del model
    gc.collect()
    return reading


def _loaded(model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto")


def _structure(model: str) -> Any:
    """The model without its weights, which takes no memory worth the name."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    with suppress(OSError):
        # Where a checkpoint brings none, transformers makes one of the configuration, as it does when it loads.
        built.generation_config = GenerationConfig.from_pretrained(model)
    return built


def engine_dtype(options: VllmOptions) -> str:
    """float32 on a CPU where nothing else is asked for, as the embedded engine has it."""
    if options.dtype == "auto" and not torch.cuda.is_available():
        return "float32"
    return options.dtype
