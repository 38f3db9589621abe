"""Loading a model and its tokenizer."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from server.engines.transformers import attention
from server.engines.transformers.options import EngineOptions
from steering.errors import EngineUnavailable, UnsupportedModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(wanted: str) -> torch.device:
    """The device to run on.

    Raises:
        EngineUnavailable: the wanted one is not there.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    if not available[wanted]:
        raise EngineUnavailable(f"device {wanted} is not available", param="device", fix="Use auto or cpu.")
    return torch.device(wanted)


def load_model(options: EngineOptions) -> PreTrainedModel:
    """The model in evaluation mode on its device.

    Raises:
        UnsupportedModel: the folder or name does not hold a model that transformers can load, or it asks for an
            attention that is not there.
    """
    device = pick_device(options.device)
    if options.dtype == "auto":
        dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    else:
        dtype = _DTYPES[options.dtype]
    try:
        attention.register()
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype,
                                                          attn_implementation=attention.NAME)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"cannot load {options.model}: {error}", param="model") from error
    placed: PreTrainedModel = model.to(device).eval()
    attention.check_attention(placed)
    return placed


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model.

    Raises:
        UnsupportedModel: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"cannot load the tokenizer of {model}: {error}", param="model") from error
