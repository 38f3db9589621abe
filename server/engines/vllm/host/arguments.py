"""Arguments of vLLM with which steering is not right, or not known to be: refused before anything is loaded."""

from collections.abc import Mapping
from typing import Any

from server.errors import InvalidSettings

# Largest value of each argument that is served, and why no more.
ONE_ONLY = {
    "prefill_context_parallel_size": "a prompt's tokens would be split among ranks, and positions with them",
    "decode_context_parallel_size": "it has not been tested with steering",
    "ubatch_size": "micro-batches run a step in parts, and a step's tokens are marked as a whole",
}
OFF_ONLY = {
    "enable_dbo": ONE_ONLY["ubatch_size"],
    "speculative_config": "receipts and the limit on steps would count drafts that are thrown away, so that a request "
                          "may end because of a token that it does not have",
    "enable_expert_parallel": "edits of routers have not been tested with experts on different ranks",
    "enable_elastic_ep": "ranks would come and go without the programs",
}
# What Trimtab sets itself, or what would keep its hooks out.
OWN = ("model", "served_model_name", "dtype", "enforce_eager", "additional_config", "worker_cls", "scheduler_cls",
       "scheduling_policy", "skip_tokenizer_init", "enable_prompt_embeds", "enable_lora", "max_loras", "max_lora_rank",
       "lora_target_modules")


def check_arguments(extra: Mapping[str, Any]) -> None:
    """
    Raises:
        InvalidSettings: naming the first argument that is refused.
    """
    for name, value in extra.items():
        if name in OWN:
            raise InvalidSettings(f"{name} is Trimtab's own to set", param=("vllm_args", name),
                                  fix="Use the setting of Trimtab for it, if there is one.")
        if name in ONE_ONLY and isinstance(value, int) and value > 1:
            raise InvalidSettings(f"{name} over 1 is not supported: {ONE_ONLY[name]}", param=("vllm_args", name),
                                  fix="Leave it out; tensor_parallel_size spreads a model over devices.")
        if name in OFF_ONLY and value:
            raise InvalidSettings(f"{name} is not supported: {OFF_ONLY[name]}", param=("vllm_args", name),
                                  fix="Leave it out.")


def check_resolved(config: Any, *, mixture: bool, adapters: bool = False) -> None:
    """The same for what vLLM has made of its arguments, defaults and environment.

    Args:
        mixture: the model has experts. adapters: requests may name adapters.

    Raises:
        InvalidSettings: naming it.
    """
    parallel = config.parallel_config
    found: dict[str, Any] = {name: getattr(parallel, name) for name in (*ONE_ONLY, "enable_dbo",
                                                                        "enable_expert_parallel")}
    check_arguments(found | {"speculative_config": config.speculative_config})
    if mixture and parallel.data_parallel_size > 1:
        raise InvalidSettings("replicas of a mixture model are not supported: a router would see the tokens of all "
                              "replicas", param=("vllm_args", "data_parallel_size"), fix="Run several servers instead.")
    if adapters and mixture:
        raise InvalidSettings("adapters on a mixture model are not supported: they have not been tested with experts",
                              param="vllm_adapters", fix="Serve the merged weights.")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if adapters and getattr(parallel, name) > 1:
            raise InvalidSettings(f"adapters with {name} over 1 are not supported: they have not been tested with "
                                  "steering on parts of a model", param=("vllm_args", name),
                                  fix="Leave one of them out.")
