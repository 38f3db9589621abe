"""Every setting of an engine reaches it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from server.boot import options_from
from server.engines.transformers.options import EngineOptions
from server.engines.vllm.host.options import VllmOptions
from server.settings import Settings

SHARED: dict[str, tuple[str, Any]] = {
    "dtype": ("dtype", "bfloat16"), "slots": ("slots", 7), "max_requests": ("max_requests", 9),
    "slot_wait_s": ("slot_wait_s", 3.0), "slot_queue": ("slot_queue", 5), "max_batch_tokens": ("max_batch_tokens", 99),
    "kv_cache_tokens": ("kv_cache_tokens", 640), "engine_stall_s": ("stall_s", 11.0),
    "engine_restart_limit": ("restart_limit", 3),
}
VLLM: dict[str, tuple[str, Any]] = {
    "vllm_eager": ("eager", True), "vllm_sites": ("sites", ("resid_pre",)), "vllm_rows": ("rows", 32),
    "vllm_graph_sites": ("graph_sites", ("mlp_out",)), "vllm_graph_ops": ("graph_ops", "all"),
    "vllm_depth": ("depth", 3), "vllm_rank": ("rank", 4), "vllm_start_s": ("start_s", 77.0),
    "vllm_adapters": ("adapters", {"lora": "/lora"}), "vllm_adapter_dir": ("adapter_dir", Path("/adapters")),
    "vllm_adapters_at_once": ("adapters_at_once", 2), "vllm_adapter_rank": ("adapter_rank", 32),
}


@pytest.mark.parametrize(("kind", "given"), [(EngineOptions, SHARED | {"device": ("device", "cpu")}),
                                             (VllmOptions, SHARED | VLLM)])
def test_settings_reach_the_options_of_the_engine(kind: Any, given: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    values: dict[str, Any] = {name: value for name, (_, value) in given.items()}
    settings = Settings(model=str(tmp_path), served_model_name="m", engine="vllm", step_limit=5.0,
                        step_limit_action="clip", **values)
    options = options_from(settings, kind)
    assert {name: getattr(options, name) for name, _ in given.values()} == dict(given.values())
    assert (options.model, options.model_id) == (str(tmp_path), "m")
    assert (options.step_limit.largest, options.step_limit.action) == (5.0, "clip")
    # The values above are not the defaults, or this would show nothing.
    plain = options_from(Settings(model=str(tmp_path)), kind)
    assert not [name for name, value in given.values() if getattr(plain, name) == value]


def test_no_setting_of_an_engine_is_forgotten() -> None:
    """Settings whose name begins with an engine's are named in the table above, but one that has another name there."""
    ours = {name for name in Settings.model_fields if name.startswith(("vllm_", "engine_"))}
    assert ours == {name for name in SHARED | VLLM if name.startswith(("vllm_", "engine_"))} | {"vllm_args"}
    assert {name for name, _ in VLLM.values()} <= {field.name for field in fields(VllmOptions)}
