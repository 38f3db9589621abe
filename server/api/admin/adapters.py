"""Adapters while the server runs, under the names that vLLM has for them: `/v1/load_lora_adapter` and
`/v1/unload_lora_adapter`."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from server.api.route import StrictRoute
from server.errors import UnsupportedParameter
from server.identity.recording import recorded
from server.requests.adapters import NewAdapter, OldAdapter
from server.requests.state import State
from server.threads import in_thread
from steering.language.errors import Conflict, InvalidRequest

router = APIRouter(prefix="/v1", tags=["admin"], route_class=StrictRoute, default_response_class=PlainTextResponse)
# Loaded at once. Each has a copy of its files, and those of a batch are in memory.
MOST = 256


@router.post("/load_lora_adapter")
async def load_adapter(body: NewAdapter, state: State) -> str:
    """Let requests name an adapter."""
    adapters, root = state.engine.adapters, state.settings.vllm_adapter_dir
    if adapters is None or root is None:
        raise UnsupportedParameter("this server loads no adapters while it runs", param="lora_path",
                                   fix="Start it with the engine vllm and vllm_adapter_dir.")
    if body.lora_name in state.settings.model_names:
        raise Conflict("this is the name of the model itself", param="lora_name", fix="Choose another name.")
    if adapters.get(body.lora_name) is not None and not body.load_inplace:
        raise Conflict(f"the adapter {body.lora_name} is loaded", param="lora_name",
                       fix="Unload it, or set load_inplace.")
    if len(adapters) >= MOST:
        raise Conflict(f"{MOST} adapters are loaded", param="lora_name", fix="Unload one.")
    folder = await in_thread(_below, root, body.lora_path)
    async with recorded(state.library.audit, "adapter.load", body.lora_name, after={"path": body.lora_path}):
        await state.engine.load_adapter(body.lora_name, folder)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/unload_lora_adapter")
async def unload_adapter(body: OldAdapter, state: State) -> str:
    """Let no request name it any more. Those that run go on with it."""
    if state.engine.adapters is None:
        raise UnsupportedParameter("this server has no adapters", param="lora_name",
                                   fix="Start it with the engine vllm and vllm_adapters or vllm_adapter_dir.")
    async with recorded(state.library.audit, "adapter.unload", body.lora_name):
        await state.engine.unload_adapter(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _below(root: Path, given: str) -> Path:
    """The folder `given`, which may be absolute. Raises InvalidRequest where it does not lie below `root`."""
    outside = InvalidRequest("the folder does not lie below vllm_adapter_dir", param="lora_path",
                             fix="Give a path below it.")
    try:
        folder, base = (root / given).resolve(), root.resolve()
    except (OSError, ValueError):
        raise outside from None
    if not folder.is_relative_to(base) or folder == base:
        raise outside
    return folder
