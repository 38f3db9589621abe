"""Bodies drawn from the OpenAPI file: what is required fits this server, what is optional is anything the file allows.

Most bodies of which every field is random are refused for their model or their messages, before anything runs. So the
schemas are narrowed here: names are those that the server under test has, layers, token ids and counts lie around what
its model has. Numbers, texts, scopes, options and everything else stay as the file describes them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode

from vectors.extract import RECIPES

OPENAPI = Path(__file__).parents[2] / "docs" / "openapi.json"
MODEL, VECTOR, PROBE, PRESET, SAE = "tiny", "push", "asked", "calm", "features"
# Aliases that nothing else names: a roll-out runs on one, drafts of roll-outs are made for the other.
ROLLED, GATED = "rolled", "gated"
# Stand for ids of a file and of activations, which only the server knows.
UPLOADED, CAPTURED = "uploaded", "captured"
D_MODEL, LAYERS, VOCABULARY = 32, 3, 97
# Optional fields of one body. With more of them nearly every body has one that refuses it.
MOST_OPTIONAL = 4

METHODS = "/v1/extract/{method}"

Schema = dict[str, Any]
_REFS = [VECTOR, f"{VECTOR}@1", PROBE, f"{VECTOR}@nowhere", "absent"]
_TURNS: list[Any] = [
    [{"role": "user", "content": "hello"}], [{"role": "user", "content": "a good day"}],
    [{"role": "system", "content": "STOP"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good"}, {"role": "user", "content": "x"}]]
_TEXTS = ["hello world", "a bad day.", "good", "STOP it", "day and day", "x", "hello hello", "no"]
_PAIRS = [{"positive": f"{text} good day {n}", "negative": f"{text} bad day {n}"} for n in range(2)
          for text in _TEXTS]
_RUNS = [{"base": "a good day", "source": "a bad day", "base_answer": "x", "source_answer": "y", "base_position": n}
         for n in (-1, 0)]
_VECTOR = {"1": {"vector": [0.5] * D_MODEL}}
# By field: what it is wherever it stands.
_FIELDS: dict[str, Schema] = {
    "model": {"enum": [MODEL, f"{MODEL}:{PRESET}"]},
    "preset": {"enum": [PRESET, PRESET, f"{PRESET}@1", "absent"]},
    "n": {"enum": [1, 2, 3]}, "best_of": {"enum": [1, 2]},
    "max_tokens": {"enum": [1, 2, 5, 8]}, "max_completion_tokens": {"enum": [1, 4]},
    "max_output_tokens": {"enum": [1, 4]}, "draws": {"enum": [1, 20, 21]}, "samples": {"enum": [1, 2]},
    "points": {"enum": [3, 4]}, "effort": {"enum": ["none", "quick"]},
    "pairs": {"enum": [_PAIRS, _PAIRS, _PAIRS[:4]]}, "d_model": {"enum": [D_MODEL, 7]},
    "previous_response_id": {"enum": [None]},
}
# What it is half of the time, and otherwise whatever the file allows: by field, or by schema and field.
_MOSTLY: dict[str | tuple[str, str], Schema] = {
    "timeout_s": {"enum": [60, 86400]},
    # Names of layers and of options are hardly ever guessed.
    ("Metadata", "options"): {"enum": [{}, {"preserve_norm": True}]},
    ("Metadata", "residual_norm"): {"enum": [{}, {"1": 2.0}]}, ("Metadata", "sigma"): {"enum": [{}, {"1": 0.5}]},
    ("Requirement", "bounds"): {"enum": [[{"figure": "kl", "at_most": 0.5}],
                                         [{"figure": "success", "grader": "whole", "at_least": 0.5}]]},
    ("NewRollout", "steps"): {"enum": [[{"share": 0.5}], [{"shadow": 0.2}, {"share": 0.1, "wait_s": 1.0}]]},
}
# Of methods of extraction, too: texts from which something could be learnt.
_LEARNT: dict[str, Schema] = {
    "text": {"enum": _TEXTS}, "answer": {"enum": _TEXTS}, "label": {"enum": ["one", "two"]},
    "item": {"enum": [None, "a", "b"]}, "split": {"enum": [None]}, "readout": {"enum": [{"target": ["hello"]}]},
}
# Optional fields without which nothing is accepted, and those with which nothing is.
_ALWAYS = {"TokenizeRequest": ["prompt"], "TuneRequest": ["pairs"], "EvaluateBody": ["preset"],
           "PatchCheckBody": ["artifact", "readers"], "Metadata": ["op"]}
_NEVER = {"TokenizeRequest": ["messages"], "EvaluateBody": ["spec", "tasks"], "PatchCheckBody": ["vector", "basis"]}
# By schema and field: what is required and could not be guessed.
_REQUIRED: dict[tuple[str, str], Schema] = {
    ("ChatRequest", "messages"): {"enum": _TURNS},
    ("MessagesRequest", "messages"): {"enum": _TURNS[:2]},
    ("CountRequest", "messages"): {"enum": _TURNS[:2]},
    ("CompletionRequest", "prompt"): {"enum": ["hello", ["hello", "a day"], [5, 6, 7], [[5, 6], [7]]]},
    ("FeaturesRequest", "artifact"): {"enum": [SAE, SAE, VECTOR, "absent"]},
    ("FeaturesRequest", "input"): {"enum": ["hello world", [5, 6, 7], _TURNS[0]]},
    ("LensRequest", "input"): {"enum": ["hello world", [5, 6, 7], _TURNS[0]]},
    ("TokenizeRequest", "prompt"): {"enum": _TEXTS},
    ("EvaluateBody", "preset"): {"enum": [PRESET]},
    ("EvaluateBody", "prompts"): {"enum": [_TEXTS[:2], _TURNS[:2], [{"prompt": "hello", "expected": ["x"]}]]},
    ("EvaluateBody", "graders"): {"enum": [
        [{"kind": "whole"}], [{"kind": "regex", "pattern": "o"}, {"kind": "whole"}], [{"kind": "length", "most": 5}],
        [{"kind": "language", "language": "fr"}]]},
    ("CalibrateOptions", "prompts"): {"enum": [_TEXTS]},
    ("AliasTarget", "version"): {"enum": [1, 2]},
    ("Metadata", "name"): {"enum": [f"made-{i}" for i in range(8)]},
    ("Metadata", "kind"): {"enum": ["vector"]},
    ("Metadata", "op"): {"enum": ["add", "clamp"]},
    ("Metadata", "site"): {"enum": ["resid_post", "mlp_out"]},
    # Values of an enum are drawn equally often, so most of them are ones that are taken.
    ("NewArtifact", "tensors"): {"enum": [
        *({"1": {"vector": [number] * D_MODEL}} for number in (0.5, 1, -1, 2, 3e-3, 4, 5, 6, 7, 8)),
        {"1": {"vector": [0.1] * (D_MODEL - 1)}}, {"99": _VECTOR["1"]}, {"1": {"weight": [1.0], "bias": [[]]}}, {}]},
    ("NewBatch", "input_file_id"): {"enum": [UPLOADED, UPLOADED, "absent"]},
    ("KeyBody", "name"): {"enum": [f"key-{i}" for i in range(500)]},
    ("NewPreset", "name"): {"enum": ["made", PRESET]},
    ("CaptureBody", "input"): {"enum": [["hello", "a day"], [[5, 6, 7], _TURNS[0]], ["x"]]},
    ("PatchCheckBody", "pairs"): {"enum": [_RUNS, _RUNS[:1]]},
    ("PatchCheckBody", "artifact"): {"enum": [VECTOR, f"{VECTOR}@1", "absent"]},
    ("PatchCheckBody", "site"): {"enum": ["resid_post"]},
    ("PatchCheckBody", "layer"): {"enum": [1, -2]},
    ("PatchCheckBody", "readers"): {"enum": [["unembedding"], ["attention.2", "mlp.2"]]},
    ("StackCheckBody", "steering"): {"enum": [
        {"interventions": [{"artifact": VECTOR}, {"artifact": VECTOR, "op": "ablate", "override": ["op"]}]},
        {"interventions": [{"artifact": VECTOR}], "preset": PRESET}, {"artifact": VECTOR}]},
    ("StackCheckBody", "prompts"): {"enum": [[], ["hello", "a day"], [[5, 6, 7], _TURNS[0]]]},
    ("PortBody", "source"): {"enum": [CAPTURED, CAPTURED, "absent"]}, ("PortBody", "name"): {"enum": ["drawn-1"]},
    ("Requirement", "target"): {"enum": [f"{PRESET}@{GATED}", "absent"]},
    ("Requirement", "collection"): {"enum": ["preset", "preset", "artifact"]},
    ("NewRollout", "target"): {"enum": [f"{PRESET}@{GATED}", f"{PRESET}@{GATED}", f"{PRESET}@{ROLLED}", "absent"]},
    ("NewRollout", "candidate"): {"enum": [2, 2, 3]},
    ("ExtractBody", "name"): {"enum": ["drawn-1", "drawn-2"]},
}


@dataclass(frozen=True)
class Endpoint:
    """An operation that takes a JSON body. requests: addresses and bodies."""

    method: str
    path: str
    requests: st.SearchStrategy[tuple[str, Any]]

    @property
    def jobs(self) -> bool:
        return (self.path.endswith(("/calibrate", "/tune", "/evaluations", "/checks/patch", "/specs/check", "/port"))
                or self.path.startswith("/v1/extract"))

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def endpoints() -> list[Endpoint]:
    """Every operation of the file that takes JSON. The bodies of methods of extraction, which the file leaves open,
    follow the schemas that `GET /v1/extract/methods` shows."""
    described = json.loads(OPENAPI.read_text())
    schemas, paths = described["components"]["schemas"], described["paths"]
    methods = paths.pop(METHODS)["post"]
    for name, recipe in RECIPES.items():
        local = recipe.request.model_json_schema(ref_template=f"#/components/schemas/{name}-{{model}}")
        schemas |= {f"{name}-{part}": schema for part, schema in local.pop("$defs", {}).items()}
        schemas[f"{name}-body"] = local
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}-body"}}}
        paths[METHODS.replace("{method}", name)] = {"post": {
            **methods, "operationId": name, "parameters": [], "requestBody": {"required": True, "content": content}}}
    for name in schemas:
        schemas[name] = _narrowed(name, schemas[name])
    file = schemathesis.openapi.from_dict(described)
    found: dict[tuple[str, str], list[st.SearchStrategy[tuple[str, Any]]]] = {}
    for path, operations in paths.items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" not in content:
                continue
            schema = content["application/json"]["schema"]
            required = schemas[schema["$ref"].rpartition("/")[2]].get("required", []) if "$ref" in schema else []
            cases = file[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE)
            of_method = path.startswith("/v1/extract/")
            found.setdefault((method.upper(), METHODS if of_method else path), []).append(
                st.tuples(st.just(_address(path)), _bodies(cases, required)))
    return [Endpoint(method, path, st.one_of(requests)) for (method, path), requests in found.items()]


def _address(path: str) -> str:
    name = PRESET if "presets" in path else VECTOR
    return path.replace("{name}", name).replace("{ref}", name).replace("{alias}", "stable")


@st.composite
def _bodies(draw: st.DrawFn, cases: st.SearchStrategy[Any], required: list[str]) -> Any:
    body = draw(cases).body
    if not isinstance(body, dict):
        return body
    optional = sorted(name for name in body if name not in required)
    kept = draw(st.sets(st.sampled_from(optional), max_size=MOST_OPTIONAL)) if optional else set()
    body = {name: value for name, value in body.items() if name in required or name in kept}
    # JSON schema takes 1.0 for a whole number and the server does not, which is seen often enough in one of eight.
    return body if draw(st.integers(0, 7)) == 0 else _whole(body)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _narrowed(name: str, schema: Any) -> Any:
    if isinstance(schema, list):
        return [_narrowed(name, inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    if "@(" in str(schema.get("pattern", "")):
        return {"enum": _REFS}
    if schema.get("type") == "integer":
        least, most = schema.get("minimum"), schema.get("maximum")
        if least == -512:
            return {"type": "integer", "minimum": -LAYERS - 1, "maximum": LAYERS}
        if least is not None and least >= 0 and (most is None or most > VOCABULARY):
            return {**schema, "maximum": VOCABULARY}
    if schema.get("type") == "number" and schema.get("maximum") == 3.4e38:
        return {"anyOf": [{"type": "number", "minimum": -4, "maximum": 4}, {"enum": [0, 1e-30, 1e9, -3.4e38]}]}
    made = {key: _narrowed(name, value) for key, value in schema.items()}
    fields = made.get("properties")
    if isinstance(fields, dict):
        learnt = _LEARNT if name.partition("-")[0] in RECIPES else {}
        for field in [*fields]:
            pinned = _REQUIRED.get((name, field)) or learnt.get(field) or _FIELDS.get(field)
            mostly = _MOSTLY.get((name, field)) or _MOSTLY.get(field)
            if mostly is not None:
                fields[field] = {"anyOf": [mostly, fields[field]]}
            if field in _NEVER.get(name, ()):
                del fields[field]
            elif pinned is not None:
                fields[field] = pinned
        if name in _ALWAYS:
            made["required"] = sorted({*made.get("required", ()), *_ALWAYS[name]})
    return made
