"""JSON that a schema allows."""

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from pydantic import Field, JsonValue, field_validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from vectors.evaluate.graders.contract import Answer, Grader, Tools, Verdict
from vectors.evaluate.graders.refusals import GraderUnusable

_FENCED = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.DOTALL)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class JsonSchemaGrader(Grader):
    """`valid` if the whole answer, or the whole of one fenced block that is the answer, is JSON that the schema allows;
    `invalid` if it is other JSON, `not_json` if it is none. References into other documents are not followed.
    """

    kind: Literal["json_schema"] = "json_schema"
    json_schema: dict[str, JsonValue] = Field(description="JSON Schema, draft 2020-12.")
    outcomes: ClassVar[tuple[str, ...]] = ("valid", "invalid", "not_json")
    prose: ClassVar[bool] = False

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            Draft202012Validator.check_schema(value)
        except SchemaError as error:
            raise ValueError(f"not a JSON Schema: {error.message}") from error
        return value

    def judge(self, answers: Sequence[Answer], tools: Tools) -> list[Verdict]:
        # With a registry of its own it does not go and fetch what a reference names.
        validator = Draft202012Validator(self.json_schema, registry=Registry())
        return [self._one(validator, answer.text) for answer in answers]

    def _one(self, validator: Any, text: str) -> Verdict:
        fenced = _FENCED.match(text)
        try:
            value = json.loads(fenced.group(1) if fenced else text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            return Verdict("not_json", False, (str(error)[:200],))
        try:
            wrong = best_match(validator.iter_errors(value))
        except Unresolvable as error:
            raise GraderUnusable(f"the schema refers to what it does not hold: {error}",
                                 param=("grader", "json_schema"), fix="Put it under $defs.") from error
        if wrong is not None:
            return Verdict("invalid", False, (f"{wrong.json_path}: {wrong.message}"[:200],))
        return Verdict("valid", True)
