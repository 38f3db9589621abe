"""`python -m scripts.specdoc`: writes docs/spec.md, the reference of the `steering` field."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from server.api.specschema import OPTIONS_KEY, spec_schema
from steering.artifacts.payload import RULES
from steering.ops import operations

PATH = Path("docs/spec.md")
ORDER = ("Steering", "Intervention", "Strength", "Dose", "Scope", "PromptSelection", "PromptPick",
         "GenerationSelection", "GenerationPick", "LayerRange", "LayerDepth", "Gate", "Gates", "Reading", "Watch",
         "Guard", "MonitorLimit", "Contrast", "Weak", "Encoded")
HEAD = """# Spec reference

Written by `python -m scripts.specdoc` from the models in `steering/language`; do not edit. The same as JSON schema:
`GET /v1/spec/schema`. Every object refuses fields that are not listed here. JSON `null` in a field that is not
required means that the field is absent.

The smallest spec names an artifact; op, site, layers, strength and options then come from it:

```json
{"steering": {"interventions": [{"artifact": "cheerful"}]}}
```
"""

KINDS = """Tensors per layer, written inline under these names. `d` is the width of the site, `r` a rank, `m` a count,
`h` head_dim, `w` a count of knots, `a` one of coordinates, `g` one of shares.

A manifold is the spline through `points`, which belong to the coordinates `knots` and lie in the subspace of the
orthonormal `basis` with its origin at `mean`. `period` is the length of an axis that wraps, 0 for one that does not.
One coordinate makes a curve (cubic; knots in rising order), two or three a surface (thin plate).

An sae has the features `f = act(encoder n(x) + encoder_bias)` and stands for `decoder^T f + decoder_bias`: with `k` the
ReLU of the k largest, else what is over `threshold` and 0. `input_norm` is what a token is divided by: 0 nothing, 1 its
norm over the root of the width, 2 its standard deviation, once its mean is taken away. [More](saes.md).

A normality artifact is read and never applied. `POST /v1/extract/normality` makes it, and
`steering/artifacts/normality.py` has the formulas.

A sparsity artifact has the length `norm` of the column of weights that reads each channel and, at each of `shares`, one
`cut` for the layer and `thresholds` by channel. `trimtab measure sparsity` makes it. [More](sparsity.md)."""


def document() -> str:
    schema = spec_schema()
    definitions = schema["$defs"]
    parts = [HEAD]
    for name in ORDER:
        parts += _section(name, definitions[name])
    parts += ["## Ops", "", "| op | sites | kinds of artifact | options | units of strength |", "|---|---|---|---|---|"]
    for op in operations():
        options = _name(schema[OPTIONS_KEY][op.name]["$ref"])
        units = "raw unit rel sigma kl" if op.adds_direction else "raw kl"
        parts.append(f"| `{op.name}` | {' '.join(op.sites)} | {' '.join(op.kinds)} | "
                     f"[{options}](#{options.lower()}) | {units} |")
    parts.append("")
    for name in dict.fromkeys(_name(ref["$ref"]) for ref in schema[OPTIONS_KEY].values()):
        parts += _section(name, definitions[name])
        for field in definitions[name].get("properties", {}).values():
            # A field that may be left out may be null too.
            for value in (value for one in (field, *field.get("anyOf", ()))
                          for value in one.get("patternProperties", {}).values()):
                parts += _section(_name(value["$ref"]), definitions[_name(value["$ref"])])
    parts += ["## Kinds", "", KINDS, "", "| kind | tensors |", "|---|---|"]
    for kind, rules in RULES.items():
        tensors = ", ".join(f"`{n}` [{', '.join(r.shape)}]{' whole numbers' if r.integer else ''}"
                            f"{' (optional)' if r.optional else ''}" for n, r in rules.items())
        parts.append(f"| {kind} | {tensors} |")
    return "\n".join(parts) + "\n"


def _section(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"## {name}", "")
    if "description" in schema:
        yield from (re.sub(r"\n +", "\n", schema["description"]), "")
    fields = schema.get("properties", {})
    if not fields:
        yield from ("No fields.", "")
        return
    yield from ("| field | type | default | meaning |", "|---|---|---|---|")
    for field, about in fields.items():
        default = "required" if field in schema.get("required", ()) else f"`{_json(about.get('default'))}`"
        meaning = about.get("description", "").replace("|", "\\|").replace("\n", " ")
        yield f"| `{field}` | {_type(about)} | {default} | {meaning} |"
    yield ""


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = _name(schema["$ref"])
        return f"[{name}](#{name.lower()})"
    either = schema.get("anyOf", schema.get("oneOf"))
    if either is not None:
        # That null is taken everywhere is said once, at the top.
        return " or ".join(dict.fromkeys(_type(part) for part in either if part.get("type") != "null"))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    kind = schema.get("type", "anything")
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(_type(item) for item in schema['prefixItems'])}]"
        return f"list of {_type(schema.get('items', {}))}{_bounds(schema, 'minItems', 'maxItems', ' entries')}"
    if "patternProperties" in schema:
        key, value = next(iter(schema["patternProperties"].items()))
        bounds = _bounds(schema, "minProperties", "maxProperties", " entries")
        return f"object of {_type(value)} by `{key.replace('|', chr(92) + '|')}`{bounds}"
    if kind == "string" and "pattern" in schema:
        return f"string matching `{schema['pattern'].replace('|', chr(92) + '|')}`"
    return f"{kind}{_bounds(schema, 'minimum', 'maximum', '')}"


def _bounds(schema: Mapping[str, Any], low: str, high: str, unit: str) -> str:
    at_least = schema.get(low, schema.get("exclusiveMinimum") if low == "minimum" else None)
    at_most = schema.get(high)
    if at_least is None and at_most is None:
        return ""
    above = "over " if low not in schema and at_least is not None else ""
    if at_least is None:
        return f" (at most {at_most}{unit})"
    return f" ({above}{at_least} to {at_most}{unit})" if at_most is not None else f" (from {above}{at_least}{unit})"


def _name(reference: str) -> str:
    return reference.rsplit("/", 1)[-1]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
