"""Adapters as vLLM knows them, and vLLM's arguments for them."""

from typing import Any

from server.engines.adapters import Adapter
from server.engines.vllm.host.options import VllmOptions

# vLLM's own linear layers that hold the layers of a block which take an adapter (`adapters.LAYERS`).
MODULES = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def lora_request(adapter: Adapter) -> Any:
    """Its name is a part of the keys of cached prefixes, so it tells contents apart."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.ref, adapter.number, str(adapter.folder))


def lora_arguments(options: VllmOptions) -> dict[str, Any]:
    if not options.takes_adapters:
        return {}
    return {"enable_lora": True, "max_loras": options.adapters_at_once, "max_lora_rank": options.adapter_rank,
            "lora_target_modules": MODULES}
