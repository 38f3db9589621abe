"""What stops a start: arguments of vLLM under which steering is not right, another vLLM, another signature."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.engines.vllm import plugin, signatures
from server.engines.vllm.host import process
from server.engines.vllm.host.arguments import ONE_ONLY, check_arguments, check_resolved
from server.engines.vllm.host.engine import VllmEngine
from server.engines.vllm.host.pulse import Pulses
from server.engines.vllm.host.reading import read_model
from server.engines.vllm.host.refusals import refusal
from server.errors import InvalidSettings
from steering.language.errors import EngineUnavailable, InvalidRequest, UnsupportedModel
from steering.models.families import FAMILIES
from tests.engines.vllm.conftest import options
from tests.tiny import SWITCHES, tiny

REFUSED: list[dict[str, Any]] = [
    *({name: 2} for name in ONE_ONLY), {"enable_dbo": True}, {"speculative_config": {"method": "ngram"}},
    {"enable_elastic_ep": True}, {"enable_expert_parallel": True},
    {"additional_config": {}}, {"worker_cls": "some.Worker"},
]


@pytest.mark.parametrize("extra", REFUSED, ids=lambda extra: next(iter(extra)))
def test_arguments_refused_before_anything_is_loaded(extra: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettings, match=next(iter(extra))) as refused:
        VllmEngine(replace(options("lab-dense"), model="/nowhere", extra=extra))
    assert refused.value.param == f"vllm_args.{next(iter(extra))}"


# What vLLM itself refuses, each of them a traceback of up to 120 lines before.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tensor_paralel_size": 2}, "tensor_parallel_size"), ({"max_num_seqs": "many"}, "whole|integer"),
    ({"max_num_seqs": 0}, "greater"), ({"quantization": "foo"}, "foo"), ({"load_format": "abc"}, "abc"),
    ({"block_size": 7}, "32"), ({"tokenizer": "/nowhere"}, "/nowhere"), ({"max_model_len": "long"}, "whole"),
    ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, "Use fewer ranks|Ray"),
    ({"distributed_executor_backend": "nobody"}, "nobody|distributed_executor_backend"),
]


@pytest.mark.parametrize(("extra", "match"), WRONG, ids=[next(iter(extra)) for extra, _ in WRONG])
def test_what_vllm_refuses_of_its_arguments_is_said_before_the_start(extra: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidSettings, match=match) as refused:
        VllmEngine(replace(options("lab-dense"), extra=extra))
    assert (refused.value.param or "").startswith("vllm_args") and "\n" not in refused.value.message
    assert refused.value.fix


def test_no_model_is_said_in_one_line() -> None:
    with pytest.raises(UnsupportedModel, match="/nowhere") as refused:
        VllmEngine(replace(options("lab-dense"), model="/nowhere"))
    assert refused.value.param == "model" and "\n" not in refused.value.message


def test_warnings_that_no_operator_caused_are_held_back_and_others_are_not(caplog: pytest.LogCaptureFixture,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    import vllm.logger

    for name in ("vllm", "vllm.config.model", "vllm.platforms.cpu"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        logging.getLogger(name).setLevel(logging.WARNING)
    vllm.logger._print_warning_once.cache_clear()
    VllmEngine(options("lab-dense"))
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not found, found
    logging.getLogger("vllm.config.model").warning("a warning of another kind")
    assert "a warning of another kind" in caplog.text


def test_what_is_served_passes() -> None:
    check_arguments({"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "speculative_config": None,
                     "distributed_executor_backend": "ray", "max_num_seqs": 4})


@pytest.mark.parametrize(("change", "match"), [
    ({}, None), ({"data_parallel_size": 2}, "mixture"), ({"enable_expert_parallel": True}, "enable_expert_parallel"),
    ({"enable_dbo": True}, "enable_dbo"), ({"ubatch_size": 4}, "ubatch_size"), ({"speculative_config": object()},
                                                                               "speculative_config"),
    ({"decode_context_parallel_size": 2}, "decode_context_parallel_size"),
])
def test_what_vllm_made_of_its_arguments_is_checked_too(change: dict[str, Any], match: str | None) -> None:
    """Defaults, the environment and vLLM's own wisdom may turn on what no argument asked for."""
    from vllm.config import ParallelConfig

    fields = {name: getattr(ParallelConfig(), name) for name in (
        *ONE_ONLY, "enable_dbo", "enable_expert_parallel", "data_parallel_size")}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**{name: change.get(name, value) for name, value in fields.items()}),
        speculative_config=change.get("speculative_config"))
    if match is None:
        check_resolved(config, mixture=True)
        return
    with pytest.raises(InvalidSettings, match=match):
        check_resolved(config, mixture=True)


def test_a_graph_of_one_piece_can_be_taken_from_the_cache() -> None:
    """vLLM asks every graph that it loads for a method that only graphs in pieces have."""
    told: list[Any] = []
    whole = lambda: None  # noqa: E731 - a function, as graphs of one piece are
    pieces = SimpleNamespace(finalize_loading=told.append)
    graphs = {"whole": whole, "pieces": pieces}
    compiler = SimpleNamespace(load_compiled_function=lambda name: SimpleNamespace(
        _artifacts=SimpleNamespace(compiled_fn=graphs[name])))
    for _ in range(2):
        plugin._wrap_loading(compiler)
    for name in graphs:
        compiler.load_compiled_function(name)._artifacts.compiled_fn.finalize_loading("config")
    assert told == ["config"]


def test_the_installed_vllm_is_the_one_that_was_tested() -> None:
    signatures.check()


def test_another_version_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(RuntimeError, match="0.33.0"):
        signatures.check()
    with pytest.raises(UnsupportedModel, match="0.33.0"):
        process.start_llm(options("lab-dense"), _reading(), Pulses())


def _changed_names() -> list[tuple[str, str, str]]:
    runner = "vllm.v1.worker.gpu_model_runner"
    return [(runner, "GPUModelRunner", "_update_states"), (runner, "GPUModelRunner", "_prepare_inputs"),
            (runner, "GPUModelRunner", "_model_forward"), ("vllm.v1.worker.gpu_worker", "Worker", "load_model"),
            ("vllm.v1.core.kv_cache_utils", "", "generate_block_hash_extra_keys")]


@pytest.mark.parametrize(("module", "owner", "name"), _changed_names(), ids=lambda part: part.split(".")[-1])
def test_a_changed_signature_does_not_start(module: str, owner: str, name: str, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    import importlib

    def changed(self: Any, anything: Any, else_: Any = None) -> None:
        raise AssertionError("never called")

    holder = importlib.import_module(module)
    monkeypatch.setattr(getattr(holder, owner) if owner else holder, name, changed)
    with pytest.raises(RuntimeError, match="not \\("):
        signatures.check()
    with pytest.raises(UnsupportedModel, match="vLLM does not start"):
        process.start_llm(options("lab-dense"), _reading(), Pulses())


def test_a_changed_signature_of_the_second_runner_does_not_start() -> None:
    from server.engines.vllm.worker.second_runner import bind_second

    class Changed:
        def add_request(self, req_index: int, new_req_data: Any) -> None: ...
        def remove_request(self, req_id: str, reason: str) -> None: ...
        def prepare_inputs(self, input_batch: Any, req_states: Any) -> None: ...

    runner: Any = SimpleNamespace(model_state=Changed(), execute_model=None)
    with pytest.raises(RuntimeError, match="remove_request.*reason"):
        bind_second(runner, None)  # type: ignore[arg-type]


def test_the_marker_does_not_outlive_a_start_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another engine started later in this process must not be wrapped."""
    import os

    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.1")
    with pytest.raises(UnsupportedModel):
        process.start_llm(options("lab-dense"), _reading(), Pulses())
    assert plugin.MARKER not in os.environ


def _reading() -> Any:
    return SimpleNamespace(facts=SimpleNamespace(context_length=512, sites={}), kv_bytes_per_token=1)


@pytest.mark.parametrize(("family", "field"), [(name, field) for name, family in FAMILIES.items() if family.vllm
                                              for field in family.vllm.ignored])
def test_a_model_that_asks_for_what_vllm_leaves_out(tmp_path: Path, family: str, field: str) -> None:
    """vLLM 0.32 loads such a model without a word, and gives other numbers."""
    tiny(family, **{field: SWITCHES[field]}).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"{field}.* {family}"):
        read_model(replace(options("lab-dense"), model=str(tmp_path)))
    tiny(family, **{field: None if field == "clip_qkv" else False}).save_pretrained(tmp_path)
    assert read_model(replace(options("lab-dense"), model=str(tmp_path))).facts.family == family


def test_what_vllm_refuses_is_the_request_and_what_fails_in_it_is_the_engine() -> None:
    from vllm.exceptions import QueueOverflowError, VLLMServerError, VLLMValidationError
    from vllm.v1.engine.exceptions import EngineGenerateError

    named = refusal(VLLMValidationError("too many", parameter="logprobs", value=[0] * 1000), begun=False)
    assert isinstance(named, InvalidRequest) and (named.message, named.param) == ("too many", "logprobs")
    # No field of a request has that name.
    other = refusal(VLLMValidationError("bad", parameter="trace_decode_token_ids"), begun=False)
    assert isinstance(other, InvalidRequest) and other.param is None

    def wrapped(cause: Exception) -> EngineGenerateError:
        error = EngineGenerateError()
        error.__cause__ = cause
        return error

    assert isinstance(refusal(wrapped(ValueError("prompt too long")), begun=False), InvalidRequest)
    assert refusal(wrapped(ValueError("index out of range")), begun=True) is None
    assert refusal(wrapped(RuntimeError("no memory")), begun=False) is None
    assert refusal(VLLMServerError("broken"), begun=False) is None
    full = refusal(QueueOverflowError(), begun=False)
    assert isinstance(full, EngineUnavailable) and full.retry_after_s
    typed = InvalidRequest("ours", param="prompt")
    assert refusal(wrapped(typed), begun=True) is typed
