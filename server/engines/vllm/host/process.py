"""Starting vLLM's AsyncLLM with Trimtab's plugin awake."""

from typing import Any

from server.engines.vllm.host.config import awake, engine_config
from server.engines.vllm.host.options import VllmOptions
from server.engines.vllm.host.pulse import Pulses, beating
from server.engines.vllm.host.reading import ModelReading
from steering.language.errors import TrimtabError, UnsupportedModel


def start_llm(options: VllmOptions, reading: ModelReading, pulses: Pulses) -> Any:
    """An AsyncLLM in processes of its own, hooks attached; `pulses` beat with each step of a replica.

    Raises:
        InvalidSettings: an argument that vLLM refuses, or under which steering is not right.
        UnsupportedModel: vLLM does not start; with its reason.
    """
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    with awake():
        config = engine_config(options, reading)
        try:
            return AsyncLLM.from_vllm_config(config, usage_context=UsageContext.ENGINE_CONTEXT,
                                             stat_loggers=[beating(pulses)],
                                             disable_log_stats=bool(options.extra.get("disable_log_stats", False)))
        except TrimtabError:
            raise
        except Exception as error:
            # vLLM raises many kinds; all of them mean that nothing can be served.
            raise UnsupportedModel(f"vLLM does not start: {error}", param="model") from error
