"""What the models of the language are built from: their base class, the types of their fields, and the limits.

Every model forbids unknown fields, so a misspelt field is an error and never a silent no-op.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, StringConstraints, model_validator
from pydantic_core import CoreSchema

MAX_INTERVENTIONS = 32
MAX_GATES = 8
MAX_MONITORS = 16
MAX_GUARD_MONITORS = 4
MAX_LIST = 4096
MAX_FLOAT = 3.4e38  # of float32, in which everything is computed
# Of a tenant, of a name without the tenant that it belongs to, and of a name with it ("team/calm").
PART_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
LONGEST_NAME = 64
NAME_PATTERN = r"^([a-z0-9][a-z0-9._-]{0,61}/)?[a-z0-9][a-z0-9._-]{0,63}$"
REF_PATTERN = NAME_PATTERN.removesuffix("$") + r"(@([0-9]{1,9}|[a-z][a-z0-9._-]{0,31}))?$"
ArtifactRef = Annotated[str, StringConstraints(pattern=REF_PATTERN)]
# Numbers are strict: neither "1" nor true is a 1, so what the models take is what the JSON schema says.
Finite = Annotated[float, Field(strict=True, ge=-MAX_FLOAT, le=MAX_FLOAT)]
Layer = Annotated[int, Field(strict=True, ge=-512, le=4096)]
Index = Annotated[int, Field(strict=True, ge=0, le=2**24)]
Position = Annotated[int, Field(strict=True, ge=-(2**24), le=2**24)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Switch = Annotated[bool, Field(strict=True)]


class NullsAbsent(BaseModel):
    """JSON `null` means that a field is absent, and the JSON schema says so of each field that may be left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if isinstance(given, dict) and None in given.values():
            return {name: value for name, value in given.items() if value is not None}
        return given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(core)
        if handler.mode == "validation":
            described = handler.resolve_ref_schema(found)
            for name, field in described.get("properties", {}).items():
                if name not in described.get("required", ()) and not _takes_null(field):
                    about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
                    described["properties"][name] = {"anyOf": [dict(field), {"type": "null"}], **about}
        return found


def _takes_null(schema: dict[str, Any]) -> bool:
    return not schema or schema.get("type") == "null" or any(map(_takes_null, schema.get("anyOf", ())))


class Model(NullsAbsent):
    """What requests and stored specs are made of."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Label = Annotated[str, StringConstraints(min_length=1, max_length=256)]
