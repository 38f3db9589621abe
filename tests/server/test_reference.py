"""Files in docs/ that are made from the code equal what the code makes; docs/errors.md lists every error."""

import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema_rs

import server.boot  # noqa: F401  for the error classes of all modules
import server.checkpoints.unavailable  # noqa: F401
import vectors.evaluate.graders.refusals  # noqa: F401
import vectors.extract.refusals  # noqa: F401
from scripts import openapi, specdoc
from server.api.specschema import spec_schema
from server.errors import STATUS
from steering.language.errors import TrimtabError

ROOT = Path(__file__).parents[2]


def test_openapi_file() -> None:
    assert (ROOT / openapi.PATH).read_text(encoding="utf-8") == openapi.document(), "run python -m scripts.openapi"


def test_spec_reference() -> None:
    assert (ROOT / specdoc.PATH).read_text(encoding="utf-8") == specdoc.document(), "run python -m scripts.specdoc"


def test_the_schema_is_one_and_means_what_the_models_mean() -> None:
    schema = spec_schema()
    jsonschema_rs.meta.validate(schema)
    validator = jsonschema_rs.Draft202012Validator(schema)
    assert validator.is_valid({"interventions": [{"artifact": "cheerful@production", "layers": [3, 4]}]})
    assert not validator.is_valid({"interventions": [{"artifact": "cheerful", "strenght": 1}]})
    assert not validator.is_valid({"interventions": [{"artifact": "../x"}]})


def every_error(cls: type[TrimtabError] = TrimtabError) -> Iterator[type[TrimtabError]]:
    for sub in cls.__subclasses__():
        if sub.__module__.partition(".")[0] in ("steering", "vectors", "server"):
            yield sub
        yield from every_error(sub)


def test_every_error_is_documented() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = {(code, int(status)) for code, status in re.findall(r"^\| `(\w+)` \| (\d{3}) \|", text, re.MULTILINE)}
    classes = {(cls.code, STATUS.get(cls.code)) for cls in every_error()}
    assert classes - rows == set()
    assert rows - classes == set(), "documented, but nowhere in the code"
