"""Loading a model and its tokenizer."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from server.engines.transformers import attention
from server.engines.transformers.options import EngineOptions
from steering.language.errors import EngineUnavailable, UnsupportedModel

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
    method: str | None = None
    try:
        attention.register()
        method = _quantisation(options.model)
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype,
                                                          attn_implementation=attention.NAME)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError) as error:
        if method is not None:
            raise _not_read(options.model, method, str(error).partition("\n")[0][:200]) from error
        raise UnsupportedModel(f"cannot load {options.model}: {error}", param="model") from error
    placed: PreTrainedModel = model.to(device).eval()
    attention.check_attention(placed)
    return placed


def _quantisation(model: str) -> str | None:
    """How the checkpoint's weights are quantised; None where they are not.

    Raises:
        UnsupportedModel: in a way that transformers does not know. It would load such weights as if they were plain.
    """
    config: Any = AutoConfig.from_pretrained(model)
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = str(found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", "")) or "?"
    if not any(known == method or known.startswith(f"{method}_") for known in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise _not_read(model, method, "transformers does not know this format and would take them for plain numbers")
    return method


def _not_read(model: str, method: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"cannot load {model}: its weights are quantised ({method}). {why.rstrip('.')}",
                            param="model", fix="Serve the weights that are not quantised, or try --engine vllm.")
