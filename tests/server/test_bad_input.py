"""Bad input: each case is a typed 4xx that names its field, reaches no engine and changes nothing."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save

from steering.artifacts.payload import Payload
from steering.language.spec import Spec
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from vectors.artifact import Metadata
from vectors.library import Library

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
GOOD = [1.0] * 8
ADD: dict[str, Any] = {"op": "add", "inline": {"vector": {"1": GOOD}}}
TOOL = {"type": "function", "function": {"name": "f"}}
META = {"name": "new", "kind": "vector", "op": "add", "site": "resid_post"}
I0 = "steering.interventions[0]"


def b64(values: Any, dtype: str = "<f4") -> str:
    return base64.b64encode(np.asarray(values, dtype=dtype).tobytes()).decode()


# name, change to a good chat request, param, words of the message
FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    ("unknown field", {"temprature": 1}, "temprature", "temperature"),
    ("no model", {"model": None}, "model", "required"),
    ("other model", {"model": "gpt"}, "model", "no model"),
    ("preset that is not there", {"model": f"{MODEL}:nil"}, "model", "nil"),
    ("path trick in a preset", {"model": f"{MODEL}:../../etc/passwd"}, "model", "reference"),
    ("model of another type", {"model": 3}, "model", "string"),
    ("no messages", {"messages": []}, "messages", "at least 1"),
    ("messages as text", {"messages": "hi"}, "messages", "list"),
    ("unknown role", {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "user"),
    ("tool role", {"messages": [*USER, {"role": "tool", "content": "x"}]}, "messages[1]", "tool_call_id"),
    ("no content", {"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ("content null", {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "required"),
    ("image part", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].image_url", "unknown"),
    ("tool calls of a user", {"messages": [{"role": "user", "content": "x", "tool_calls": [
        {"id": "a", "function": {"name": "f", "arguments": "{}"}}]}]}, "messages[0]", "assistant"),
    ("a name that could end a turn", {"messages": [{"role": "user", "content": "x", "name": "<|end|>"}]},
     "messages[0].name", "pattern"),
    ("a call without its function", {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
     "messages[0].tool_calls[0].function", "required"),
    ("unknown message field", {"messages": [{"role": "user", "content": "x", "contents": "y"}]},
     "messages[0].contents", "content"),
    ("prompt over the context", {"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "context"),
    ("max_tokens over the context", {"max_tokens": 255}, "max_tokens", "context"),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens", "greater"),
    ("max_tokens negative", {"max_tokens": -1}, "max_tokens", "greater"),
    ("max_tokens fraction", {"max_tokens": 1.5}, "max_tokens", "integer"),
    ("max_tokens text", {"max_tokens": "8"}, "max_tokens", "integer"),
    ("max_tokens true", {"max_tokens": True}, "max_tokens", "integer"),
    ("two limits", {"max_tokens": 3, "max_completion_tokens": 4}, "body", "differ"),
    ("n 0", {"n": 0}, "n", "greater"),
    ("n huge", {"n": 10**9}, "n", "allows"),
    ("n over 64 bits", {"n": 10**30}, "n", "64 bits"),
    ("temperature negative", {"temperature": -0.1}, "temperature", "greater"),
    ("temperature hot", {"temperature": 2.1}, "temperature", "less"),
    ("temperature text", {"temperature": "hot"}, "temperature", "number"),
    ("top_p 0", {"top_p": 0}, "top_p", "greater"),
    ("top_p over 1", {"top_p": 1.1}, "top_p", "less"),
    ("top_k negative", {"top_k": -2}, "top_k", "greater"),
    ("min_p over 1", {"min_p": 2}, "min_p", "less"),
    ("presence_penalty", {"presence_penalty": 3}, "presence_penalty", "less"),
    ("frequency_penalty", {"frequency_penalty": -3}, "frequency_penalty", "greater"),
    ("repetition_penalty", {"repetition_penalty": 0}, "repetition_penalty", "greater"),
    ("logit_bias key", {"logit_bias": {"word": 1}}, "logit_bias.word", "no token"),
    ("logit_bias beyond the vocabulary", {"logit_bias": {"99999": 1}}, "logit_bias.99999", "no token"),
    ("logit_bias value", {"logit_bias": {"5": 101}}, "logit_bias.5", "between"),
    ("logit_bias list", {"logit_bias": [1]}, "logit_bias", "object"),
    ("seed text", {"seed": "x"}, "seed", "integer"),
    ("seed of 70 bits", {"seed": 2**63}, "seed", "less"),
    ("stop empty", {"stop": ""}, "stop", "at least 1"),
    ("stop number", {"stop": 5}, "stop", "string"),
    ("too many stops", {"stop": ["x"] * 17}, "stop", "at most 16"),
    ("stop holds null", {"stop": ["x", None]}, "stop[1]", "string"),
    ("top_logprobs alone", {"top_logprobs": 2}, "body", "logprobs"),
    ("top_logprobs over 20", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less"),
    ("logprobs as number", {"logprobs": 2}, "logprobs", "boolean"),
    ("stream text", {"stream": "yes"}, "stream", "boolean"),
    ("stream_options without stream", {"stream_options": {"include_usage": True}}, "body", "stream"),
    ("unknown stream option", {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "include"),
    ("tool without function", {"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    ("tool of another kind", {"tools": [{"type": "web"}]}, "tools[0].type", "only"),
    ("tool with a bad name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name",
     "pattern"),
    ("tools", {"tools": [TOOL]}, "tools", "not known"),
    ("two tools of one name", {"tools": [TOOL, TOOL]}, "tools[1].function.name", "two tools"),
    ("tool_choice", {"tool_choice": "required"}, "tool_choice", "no tools"),
    ("tool_choice of none", {"tool_choice": {"type": "function", "function": {"name": "f"}}},
     "tool_choice.function.name", "no tool f"),
    ("functions", {"functions": [{}]}, "functions", "only []"),
    ("json mode", {"response_format": {"type": "json_object"}}, "response_format", "no structured output"),
    ("structured", {"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "no structured output"),
    ("two forms", {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ("both", {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs",
     "both"),
    ("no schema", {"structured_outputs": {"json": "[]"}}, "structured_outputs.json", "no JSON schema"),
    ("audio", {"audio": {"voice": "x"}}, "audio", "not offer"),
    ("modalities", {"modalities": ["audio"]}, "modalities", "only"),
    ("min_tokens", {"min_tokens": 9, "max_tokens": 8}, "min_tokens", "may have 8"),
    ("stop_token_ids", {"stop_token_ids": [3, 10**9]}, "stop_token_ids[1]", "no token"),
    ("allowed_token_ids", {"allowed_token_ids": [10**9]}, "allowed_token_ids[0]", "no token"),
    ("no allowed_token_ids", {"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
    ("bad_words", {"bad_words": [" "]}, "bad_words[0]", "no token"),
    ("priority", {"priority": 1}, "priority", "only 0"),
    ("two turns", {"continue_final_message": True, "add_generation_prompt": True}, "body", "not both"),
    ("nothing to continue", {"continue_final_message": True}, "body", "last message of the assistant"),
    ("special tokens in the text", {"skip_special_tokens": False}, "skip_special_tokens", "only true"),
    ("arguments of the template", {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs.a", "no variable"),
    ("what the template is given anyway", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages",
     "no variable"),
    ("reasoning_effort", {"reasoning_effort": "high"}, "reasoning_effort", "knows no effort"),
    ("service_tier", {"service_tier": "priority"}, "service_tier", "only"),
    ("prediction", {"prediction": {}}, "prediction", "not offer"),
    ("web search", {"web_search_options": {}}, "web_search_options", "not offer"),
    ("metadata of numbers", {"metadata": {"a": 1}}, "metadata.a", "string"),
    ("surrogate half", {"user": "\ud800"}, "user", "surrogate"),
]

# name, the steering field, param, words
STEERING: list[tuple[str, Any, str, str]] = [
    ("text", "cheerful", "steering", "object"),
    ("list", [], "steering", "object"),
    ("unknown field", {"intervention": []}, "steering.intervention", "interventions"),
    ("preset path", {"preset": "../x"}, "steering.preset", "pattern"),
    ("default unknown", {"default": "maybe"}, "steering.default", "inherit"),
    ("none with interventions", {"default": "none", "interventions": [ADD]}, "steering", "none"),
    ("override with nothing", {"default": "override"}, "steering", "override"),
    ("report unknown", {"report": "all"}, "steering.report", "summary"),
    ("33 interventions", {"interventions": [ADD] * 33}, "steering.interventions", "at most 32"),
    ("empty intervention", {"interventions": [{}]}, I0, "exactly one"),
    ("artifact and inline", {"interventions": [{**ADD, "artifact": "a"}]}, I0, "exactly one"),
    ("unknown op", {"interventions": [{**ADD, "op": "explode"}]}, f"{I0}.op", "ablate"),
    ("unknown site", {"interventions": [{**ADD, "site": "resid"}]}, f"{I0}.site", "resid_post"),
    ("site not offered", {"interventions": [{"op": "expert_mask", "inline": {"experts": {"1": [0]}}}]}, f"{I0}",
     "router"),
    ("op that does not act there", {"interventions": [{**ADD, "site": "router"}]}, f"{I0}.site", "router"),
    ("artifact with two slashes", {"interventions": [{"artifact": "a/b/c"}]}, f"{I0}.artifact", "pattern"),
    ("artifact with dots", {"interventions": [{"artifact": "../a"}]}, f"{I0}.artifact", "pattern"),
    ("artifact with a null byte", {"interventions": [{"artifact": "a\x00"}]}, f"{I0}.artifact", "pattern"),
    ("artifact not there", {"interventions": [{"artifact": "nil"}]}, f"{I0}.artifact", "nil"),
    ("version not there", {"interventions": [{"artifact": "kept@7"}]}, f"{I0}.artifact", "kept@7"),
    ("layer out of range", {"interventions": [{**ADD, "layers": [9], "inline": {"vector": GOOD}}]},
     f"{I0}.layers[0]", "does not exist"),
    ("inline layer out of range", {"interventions": [{**ADD, "inline": {"vector": {"9": GOOD}}}]},
     f"{I0}.inline.vector", "does not exist"),
    ("layers text", {"interventions": [{**ADD, "layers": "some"}]}, f"{I0}.layers", "all"),
    ("layer range misspelt", {"interventions": [{**ADD, "layers": {"start": 1, "stp": 2}}]}, f"{I0}.layers.stp",
     "stop"),
    ("depth over 1", {"interventions": [{**ADD, "layers": {"depth": [0, 2]}}]}, f"{I0}.layers.depth[1]", "less"),
    ("wrong width", {"interventions": [{**ADD, "inline": {"vector": {"1": [1.0] * 7}}}]}, f"{I0}.inline", "width"),
    ("NaN", {"interventions": [{**ADD, "inline": {"vector": {"1": [float("nan")] * 8}}}]},
     f"{I0}.inline.vector.1[0]", "NaN"),
    ("infinity", {"interventions": [{**ADD, "inline": {"vector": {"1": [*GOOD[1:], float("inf")]}}}]},
     f"{I0}.inline.vector.1[7]", "infinity"),
    ("NaN in base64", {"interventions": [{**ADD, "inline": {"vector": {"1": {
        "base64": b64([np.nan] * 8), "shape": [8]}}}}]}, f"{I0}.inline", "NaN"),
    ("zero vector", {"interventions": [{**ADD, "inline": {"vector": {"1": [0] * 8}}}]}, f"{I0}.inline", "zero"),
    ("ragged", {"interventions": [{**ADD, "inline": {"vector": {"1": [1, [2]]}}}]}, f"{I0}.inline", "rectangular"),
    ("words for numbers", {"interventions": [{**ADD, "inline": {"vector": {"1": ["a"] * 8}}}]}, f"{I0}.inline",
     "numbers"),
    ("base64 broken", {"interventions": [{**ADD, "inline": {"vector": {"1": {"base64": "?", "shape": [8]}}}}]},
     f"{I0}.inline", "base64"),
    ("base64 of another length", {"interventions": [{**ADD, "inline": {"vector": {"1": {
        "base64": b64(GOOD[1:]), "shape": [8]}}}}]}, f"{I0}.inline", "bytes"),
    ("giant inline vector", {"interventions": [{**ADD, "inline": {"vector": {"1": [1] * 1_100_000}}}]},
     f"{I0}.inline", "bytes"),
    ("inline misspelt", {"interventions": [{**ADD, "inline": {"vectr": {"1": GOOD}}}]}, f"{I0}.inline.vectr",
     "vector"),
    ("inline without op", {"interventions": [{"inline": {"vector": {"1": GOOD}}}]}, I0, "op"),
    ("inline without layers", {"interventions": [{**ADD, "inline": {"vector": GOOD}}]}, f"{I0}.layers", "layers"),
    ("inline layer no number", {"interventions": [{**ADD, "inline": {"vector": {"one": GOOD}}}]},
     f"{I0}.inline.vector", "layer"),
    ("strength text", {"interventions": [{**ADD, "strength": "much"}]}, f"{I0}.strength", "object"),
    ("strength unit", {"interventions": [{**ADD, "strength": {"value": 1, "unit": "furlong"}}]},
     f"{I0}.strength.unit", "sigma"),
    ("strength infinite", {"interventions": [{**ADD, "strength": float("inf")}]}, f"{I0}.strength", "infinity"),
    ("rel without norms", {"interventions": [{**ADD, "strength": {"value": 1, "unit": "rel"}}]},
     f"{I0}.strength.unit", "norm"),
    ("option misspelt", {"interventions": [{**ADD, "options": {"norm_mach": True}}]}, f"{I0}.options.norm_mach",
     "norm_match"),
    ("options that exclude each other", {"interventions": [{**ADD, "options": {
        "norm_match": True, "preserve_norm": True}}]}, f"{I0}.options", "exclude"),
    ("scope touches nothing", {"interventions": [{**ADD, "scope": {"prompt": "none", "generation": "none"}}]},
     f"{I0}.scope", "no token"),
    ("scope field misspelt", {"interventions": [{**ADD, "scope": {"promt": "all"}}]}, f"{I0}.scope.promt", "prompt"),
    ("scope value", {"interventions": [{**ADD, "scope": {"prompt": "some"}}]}, f"{I0}.scope.prompt", "all"),
    ("position outside", {"interventions": [{**ADD, "scope": {"prompt": {"positions": [99]}}}]},
     f"{I0}.scope.prompt.positions", "outside"),
    ("window of one", {"interventions": [{**ADD, "scope": {"prompt": {"windows": [[1]]}}}]},
     f"{I0}.scope.prompt.windows[0]", "required"),
    ("negative generated position", {"interventions": [{**ADD, "scope": {"generation": {"positions": [-1]}}}]},
     f"{I0}.scope.generation.positions[0]", "greater"),
    ("override unknown", {"interventions": [{**ADD, "override": ["all"]}]}, f"{I0}.override[0]", "model"),
    ("made for another op", {"interventions": [{"artifact": "kept", "op": "clamp", "options": {"value": 1}}]},
     f"{I0}.op", "meant for"),
    ("made for another site", {"interventions": [{"artifact": "kept", "site": "mlp_out"}]}, f"{I0}.site", "made at"),
    ("second of two", {"interventions": [ADD, {"artifact": "nil"}]}, "steering.interventions[1].artifact", "nil"),
]

# name, headers, body, status, code, param
BODIES: list[tuple[str, dict[str, str], bytes, int, str, str]] = [
    ("nothing", {}, b"", 400, "invalid_json", "body"),
    ("half of an object", {}, b'{"model": ', 400, "invalid_json", "body"),
    ("not UTF-8", {}, b'{"model": "\xff\xfe"}', 400, "invalid_json", "body"),
    ("UTF-16", {}, '{"model": "x"}'.encode("utf-16"), 400, "invalid_json", "body"),
    ("a list", {}, b"[]", 400, "invalid_request", "body"),
    ("a number", {}, b"5", 400, "invalid_request", "body"),
    ("null", {}, b"null", 400, "invalid_request", "body"),
    ("200 000 brackets", {}, b"[" * 200_000, 400, "invalid_json", "body"),
    ("200 000 objects", {}, b'{"a":' * 200_000, 400, "invalid_json", "body"),
    ("deep steering", {}, json.dumps(chat()).encode()[:-1] + b', "steering": ' + b"[" * 500 + b"]" * 500 + b"}", 400,
     "invalid_json", "steering"),
    ("a key twice", {}, b'{"model": "tiny", "model": "tiny"}', 400, "invalid_json", "model"),
    ("NaN", {}, b'{"temperature": NaN}', 400, "invalid_json", "temperature"),
    ("digits without end", {}, b'{"seed": ' + b"1" * 10_000 + b"}", 400, "invalid_json", "body"),
    ("form", {"Content-Type": "application/x-www-form-urlencoded"}, b"a=b", 415, "unsupported_media_type",
     "Content-Type"),
    ("no type", {"Content-Type": ""}, b"{}", 415, "unsupported_media_type", "Content-Type"),
    ("17 MiB", {}, b" " * (17 * 2**20), 413, "payload_too_large", "body"),
]


def gguf_header(count: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, count)


def st_header(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# name, bytes, metadata, param
FILES: list[tuple[str, bytes, Any, str]] = [
    ("empty", b"", META, "file"),
    ("noise", b"\x00\x01\x02" * 50, META, "file"),
    ("pickle", b"\x80\x04\x95" + b"x" * 50, META, "file"),
    ("safetensors cut off", save({"1.vector": torch.ones(8)})[:40], META, "file"),
    ("safetensors, header length a lie", struct.pack("<Q", 2**62) + b"{", META, "file"),
    ("safetensors, header no JSON", struct.pack("<Q", 4) + b"{{{{", META, "file"),
    ("safetensors, offsets outside", st_header({"1.vector": {"dtype": "F32", "shape": [8], "data_offsets": [0, 999]}}),
     META, "file"),
    ("safetensors, no metadata", save({"1.vector": torch.ones(8)}), {}, "metadata.name"),
    ("safetensors, tensor names", save({"vector": torch.ones(8)}), META, "tensors"),
    ("safetensors, NaN", save({"1.vector": torch.full((8,), torch.nan)}), META, "layers[1].vector"),
    ("safetensors, path as name", save({"1.vector": torch.ones(8)}), {**META, "name": "../../x"}, "metadata.name"),
    ("safetensors, metadata unknown field", save({"1.vector": torch.ones(8)}), {**META, "nme": 1}, "metadata.nme"),
    ("metadata no JSON", save({"1.vector": torch.ones(8)}), "{", "metadata"),
    ("metadata a list", save({"1.vector": torch.ones(8)}), "[]", "metadata"),
    ("gguf magic only", b"GGUF", META, "file"),
    ("gguf cut off", gguf_header(5), META, "file"),
    ("gguf, a billion keys", gguf_header(10**9) + b"\x00" * 64, META, "file"),
]

# name, body of POST /v1/artifacts, param
CREATES: list[tuple[str, Any, str]] = [
    ("no metadata", {"tensors": {"1": {"vector": GOOD}}}, "metadata"),
    ("no tensors", {"metadata": META}, "tensors"),
    ("empty tensors", {"metadata": META, "tensors": {}}, "tensors.layers"),
    ("path as name", {"metadata": {**META, "name": "../x"}, "tensors": {"1": {"vector": GOOD}}}, "metadata.name"),
    ("upper case name", {"metadata": {**META, "name": "New"}, "tensors": {"1": {"vector": GOOD}}}, "metadata.name"),
    ("long name", {"metadata": {**META, "name": "x" * 65}, "tensors": {"1": {"vector": GOOD}}}, "metadata.name"),
    ("unknown kind", {"metadata": {**META, "kind": "spell"}, "tensors": {"1": {"vector": GOOD}}}, "metadata.kind"),
    ("kind and op", {"metadata": {**META, "op": "expert_mask"}, "tensors": {"1": {"vector": GOOD}}}, "metadata"),
    ("layer text", {"metadata": META, "tensors": {"one": {"vector": GOOD}}}, "tensors"),
    ("layer negative", {"metadata": META, "tensors": {"-1": {"vector": GOOD}}}, "tensors"),
    ("tensor name", {"metadata": META, "tensors": {"1": {"vectors": GOOD}}}, "tensors.layers[1]"),
    ("text for numbers", {"metadata": META, "tensors": {"1": {"vector": "abc"}}}, "tensors.1.vector"),
    ("two widths", {"metadata": META, "tensors": {"1": {"vector": GOOD}, "2": {"vector": [1.0]}}}, "layers"),
    ("d_model differs", {"metadata": {**META, "d_model": 9}, "tensors": {"1": {"vector": GOOD}}}, "metadata.d_model"),
    ("infinite norm", {"metadata": {**META, "residual_norm": {"1": -1}}, "tensors": {"1": {"vector": GOOD}}},
     "metadata.residual_norm.1"),
    ("unknown field", {"metadata": META, "tensors": {"1": {"vector": GOOD}}, "alias": "x"}, "alias"),
]

# method, path, body, status, param
ROUTES: list[tuple[str, str, Any, int, str | None]] = [
    ("GET", "/v1/nothing", None, 404, "path"),
    ("GET", "/v1/chat/completions", None, 405, "method"),
    ("BREW", "/v1/models", None, 405, "method"),
    ("DELETE", "/v1/models", None, 405, "method"),
    ("GET", "/v1/artifacts/nil", None, 404, "artifact"),
    ("GET", "/v1/artifacts/..%2F..%2Fetc", None, 404, "path"),
    ("GET", "/v1/artifacts/%2e%2e", None, 400, "artifact"),
    ("GET", "/v1/artifacts/kept@99", None, 404, "artifact"),
    ("GET", "/v1/artifacts/kept/download?format=pt", None, 400, "format"),
    ("GET", "/v1/artifacts/kept/download?layers=a", None, 400, "layers"),
    ("GET", "/v1/artifacts/kept/download?layers=9", None, 400, "layers"),
    ("GET", "/v1/artifacts?limit=0", None, 400, "limit"),
    ("GET", "/v1/artifacts?limit=1e9", None, 400, "limit"),
    ("GET", "/v1/artifacts?cursor=%00", None, 400, "cursor"),
    ("GET", "/v1/artifacts?order=size", None, 400, "order"),
    ("GET", "/v1/artifacts?kindd=vector", None, 400, "kindd"),
    ("PATCH", "/v1/artifacts/kept", {"name": "other"}, 400, "name"),
    ("PATCH", "/v1/artifacts/kept", {"tags": ["A B"]}, 400, "tags[0]"),
    ("PATCH", "/v1/artifacts/nil", {}, 404, "artifact"),
    ("DELETE", "/v1/artifacts/nil", None, 404, "artifact"),
    ("DELETE", "/v1/artifacts/kept", None, 409, "artifact"),
    ("DELETE", "/v1/artifacts/kept?force=perhaps", None, 400, "force"),
    ("PUT", "/v1/artifacts/kept/aliases/UP", {"version": 1}, 400, "alias"),
    ("PUT", "/v1/artifacts/kept/aliases/latest", {"version": 1}, 400, "alias"),
    ("PUT", "/v1/artifacts/kept/aliases/next", {"version": 99}, 404, None),
    ("PUT", "/v1/artifacts/kept/aliases/next", {"version": "1"}, 400, "version"),
    ("DELETE", "/v1/artifacts/kept/aliases/next", None, 404, "alias"),
    ("POST", "/v1/presets", {"name": "../x", "spec": {"interventions": [ADD]}}, 400, "name"),
    ("POST", "/v1/presets", {"name": "x", "spec": {"interventions": [{"artifact": "nil"}]}}, 404,
     "spec.interventions[0].artifact"),
    ("POST", "/v1/presets", {"name": "x", "spec": {"interventions": [{**ADD, "layers": [50]}]}}, 400,
     "spec.interventions[0].layers[0]"),
    ("POST", "/v1/presets", {"name": "x", "spec": {"intervention": []}}, 400, "spec.intervention"),
    ("GET", "/v1/presets/nil", None, 404, "preset"),
    ("DELETE", "/v1/presets/nil", None, 404, "preset"),
    ("PUT", "/v1/admin/default-spec", {}, 400, "body"),
    ("PUT", "/v1/admin/default-spec", {"preset": "nil"}, 404, "preset"),
    ("PUT", "/v1/admin/default-spec", {"interventions": [{"artifact": "nil"}]}, 404, "interventions[0].artifact"),
    ("PUT", "/v1/admin/kill-switch", {"on": "yes"}, 400, "on"),
    ("GET", "/v1/jobs/nil", None, 404, "id"),
    ("GET", "/v1/jobs/..%2f", None, 404, "path"),
    ("POST", "/v1/jobs/job-000000000000000000000000/cancel", None, 404, "id"),
    ("POST", "/v1/extract", {"name": "x"}, 400, "pairs"),
    ("POST", "/v1/extract", {"name": "x", "pairs": [{"positive": "a", "negatve": "b"}] * 4}, 400,
     "pairs[0].negatve"),
    ("POST", "/v1/extract", {"name": "x", "site": "router", "pairs": [{"positive": "a", "negative": "b"}] * 4}, 400,
     "site"),
    ("POST", "/v1/extract", {"name": "x", "pairs": [{"positive": [99999], "negative": "b"}] * 4}, 400,
     "pairs[0].positive"),
    ("POST", COMPLETE, {"model": MODEL, "prompt": [99999]}, 400, "prompt[0]"),
    ("POST", COMPLETE, {"model": MODEL, "prompt": [[1], [99999]]}, 400, "prompt[1][0]"),
    ("POST", COMPLETE, {"model": MODEL, "prompt": [-1]}, 400, "prompt[0]"),
    ("POST", COMPLETE, {"model": MODEL, "prompt": []}, 400, "prompt"),
    ("POST", COMPLETE, {"model": MODEL, "prompt": ["a"] * 5}, 400, "prompt"),
    ("POST", COMPLETE, {"model": MODEL, "prompt": [True]}, 400, "prompt[0]"),
    ("POST", COMPLETE, {"model": MODEL, "prompt": {"a": 1}}, 400, "prompt"),
    ("POST", COMPLETE, {"model": MODEL}, 400, "prompt"),
]


@pytest.fixture
def filled(library: Library) -> Library:
    metadata = Metadata(name="kept", kind="vector", op="add", site="resid_post")
    library.create(metadata, Payload.build("vector", {2: {"vector": torch.ones(8)}}))
    library.presets.create("uses-kept", Spec.model_validate({"interventions": [{"artifact": "kept"}]}))
    return library


def state(library: Library, tmp_path: Path) -> Any:
    return (library.list().items, library.presets.list().items, library.switches.default_spec(),
            library.switches.kill_switch(), sorted(p.name for p in (tmp_path / "blobs").rglob("*")),
            sorted(p.name for p in (tmp_path / "data" / "jobs").glob("*")))


@pytest.fixture
async def send(client: httpx.AsyncClient, filled: Library, engine: ScriptedEngine, tmp_path: Path) -> Any:
    """Sends a request and holds that it changed nothing; returns status and error."""
    before = state(filled, tmp_path)

    async def send(method: str, path: str, **given: Any) -> tuple[int, dict[str, Any]]:
        answer = await client.request(method, path, **given)
        assert "error" in answer.text, (method, path, answer.status_code, answer.text[:200])
        assert engine.completions == []
        assert state(filled, tmp_path) == before
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return answer.status_code, error

    return send


def dumped(value: Any) -> dict[str, Any]:
    # json.dumps writes what httpx refuses to: NaN, infinity, surrogates.
    return {"content": json.dumps(value).encode(), "headers": {"Content-Type": "application/json"}}


def test_there_are_enough_cases() -> None:
    assert sum(map(len, (FIELDS, STEERING, BODIES, FILES, CREATES, ROUTES))) >= 100


async def test_fields(send: Any) -> None:
    for name, change, param, words in FIELDS:
        status, error = await send("POST", CHAT, **dumped(chat() | change))
        assert status in (400, 404), name
        assert (error["param"], words in error["message"]) == (param, True), (name, error)


async def test_steering(send: Any) -> None:
    for name, steering, param, words in STEERING:
        status, error = await send("POST", CHAT, **dumped(chat(steering=steering)))
        assert status in (400, 404, 409, 413), (name, error)
        assert error["param"].startswith(param) and words in error["message"], (name, error)


async def test_bodies(send: Any) -> None:
    for name, headers, body, status, code, param in BODIES:
        got, error = await send("POST", CHAT, content=body, headers={"Content-Type": "application/json"} | headers)
        assert (got, error["code"]) == (status, code), (name, error)
        assert error["param"].startswith(param), (name, error)


async def test_files(send: Any) -> None:
    for name, data, metadata, param in FILES:
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        status, error = await send("POST", "/v1/artifacts/import", files={"file": ("../../x.bin", data)},
                                   data={"metadata": text})
        assert status == 400 and error["param"] == param, (name, error)
        status, error = await send("POST", "/v1/artifacts/import", params={"metadata": text}, content=data,
                                   headers={"Content-Type": "application/octet-stream"})
        assert status == 400 and error["param"] == param, (name, error)


async def test_uploads_that_are_no_upload(send: Any) -> None:
    url = "/v1/artifacts/import"
    broken = {"content": b"--x\r\nbroken", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    for given, status, param in ((broken, 400, ("body", "file")), ({"json": {}}, 415, ("Content-Type",)),
                                 ({"files": {"data": b"x"}}, 400, ("data",)),
                                 ({"files": {"file": b"x", "metadata": b"{}"}}, 400, ("body", "metadata")),
                                 ({"files": {"file": b"x"}, "data": {"name": "y"}}, 400, ("name",))):
        got, error = await send("POST", url, **given)
        assert got == status and error["param"] in param, (given, error)


async def test_creates(send: Any) -> None:
    for name, body, param in CREATES:
        status, error = await send("POST", "/v1/artifacts", json=body)
        assert status in (400, 409) and error["param"] == param, (name, error)


async def test_routes(send: Any) -> None:
    for method, path, body, status, param in ROUTES:
        given = {} if body is None else {"json": body}
        got, error = await send(method, path, **given)
        assert got == status, (method, path, error)
        assert param is None or error["param"] == param, (method, path, error)
