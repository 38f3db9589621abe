"""The published JSON schema of the `steering` field."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from steering.language.gates import Reading
from steering.language.intervention import Encoded
from steering.language.spec import Steering
from steering.ops import operations

OPTIONS_KEY = "x-options"


def spec_schema() -> dict[str, Any]:
    """JSON schema of Steering. Definitions of the options of each op stand beside it, named under `x-options`."""
    models: list[type[BaseModel]] = [Steering, Encoded, Reading, *dict.fromkeys(op.options for op in operations())]
    references, schema = models_json_schema([(model, "validation") for model in models],
                                            ref_template="#/$defs/{model}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **references[Steering, "validation"],
        "$defs": schema["$defs"],
        OPTIONS_KEY: {op.name: references[op.options, "validation"] for op in operations()},
    }
