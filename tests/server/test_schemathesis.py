"""Requests made up from the OpenAPI schema, sent to a real server: none may make it fail."""

import os
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from pydantic import SecretStr
from schemathesis.checks import not_a_server_error

from server.app import create_app, routed
from server.cli.inprocess import running
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.server.conftest import MODEL
from tests.server.scripted import ScriptedEngine
from tests.server.tokenizers import byte_tokenizer
from vectors.library import Library

schema = schemathesis.openapi.from_dict(routed().openapi())
# Thousands of further cases, which take minutes.
schema.config.phases.coverage.enabled = "TRIMTAB_TEST_ALL" in os.environ


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("schemathesis")
    tokenizer = byte_tokenizer()
    vocabulary = Vocabulary(tokenizer, [tokenizer.eos_token_id], len(tokenizer))
    library = Library.open(f"sqlite:///{folder / 'library.db'}", str(folder / "blobs"))
    chosen = Settings(served_model_name=MODEL, data_dir=folder / "data", api_key=SecretStr("owner"))
    with running(create_app(chosen, ScriptedEngine(vocabulary), library, vocabulary)) as found:
        yield found


@schema.parametrize()
@settings(max_examples=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_server_error(case: schemathesis.Case, url: str) -> None:
    answer = case.call(base_url=url, headers={"Authorization": "Bearer owner"})
    case.validate_response(answer, checks=[not_a_server_error])
