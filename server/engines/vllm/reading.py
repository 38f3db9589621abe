"""What Trimtab must know of a model before vLLM loads it: facts, fingerprint, end-of-text tokens."""

import gc
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from server.engines.vllm.attach import FAMILIES
from server.engines.vllm.options import VllmOptions
from steering.language.errors import UnsupportedModel
from steering.models.describe import model_facts
from steering.models.facts import ModelFacts
from steering.models.fingerprints import fingerprint

# Fields of a configuration that vLLM 0.32 passes over in silence; each is 2 nats off or more in a small random model.
# All others of the families served there give what eager transformers gives.
DROPPED = {
    # The bias of the output projection.
    "qwen3": ("attention_bias",), "qwen3_moe": ("attention_bias",),
    "olmoe": ("attention_bias", "clip_qkv", "norm_topk_prob", "tie_word_embeddings"),
}


@dataclass(frozen=True)
class ModelReading:
    """facts: with every site that the structure offers. end_ids: end-of-text tokens of the generation config."""

    facts: ModelFacts
    end_ids: tuple[int, ...]
    kv_bytes_per_token: int


def read_model(options: VllmOptions) -> ModelReading:
    """Load the checkpoint once into memory, as transformers has it, and let it go.

    Raises:
        UnsupportedModel: no model that transformers can load, a family whose blocks are not hooked in vLLM, or a model
            that asks for what vLLM leaves out.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"cannot load {options.model}: {str(error).strip().splitlines()[0]}",
                               param="model") from error
    facts = model_facts(model, model_id=options.model_id, fingerprint=fingerprint(model))
    if facts.family not in FAMILIES:
        raise UnsupportedModel(f"the vLLM engine does not steer {facts.family}", param="model",
                               fix=f"Known there: {', '.join(FAMILIES)}. The embedded engine knows more.")
    config = model.config
    for name in DROPPED.get(facts.family, ()):
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


def engine_dtype(options: VllmOptions) -> str:
    """float32 on a CPU where nothing else is asked for, as the embedded engine has it."""
    if options.dtype == "auto" and not torch.cuda.is_available():
        return "float32"
    return options.dtype
