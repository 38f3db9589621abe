"""Bodies of the requests that load and unload adapters, in vLLM's words."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from server.settings import ADAPTER_NAME_PATTERN


class NewAdapter(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(pattern=ADAPTER_NAME_PATTERN, description="What requests will name as `model`.")
    lora_path: str = Field(min_length=1, max_length=4096, description="Folder as PEFT writes it, below the setting "
                           "vllm_adapter_dir.")
    load_inplace: bool = Field(default=False, description="Take the place of an adapter that has the name.")
    is_3d_lora_weight: Literal[False] | None = Field(default=None, description="Adapters of experts are not served.")


class OldAdapter(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(max_length=256)
    lora_int_id: int | None = Field(default=None, description="Accepted, not used.")
