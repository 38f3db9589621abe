"""Requests made up from the OpenAPI schema: none may make the server fail."""

from collections.abc import Iterator

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from starlette.testclient import TestClient

from server.app import routed

schema = schemathesis.openapi.from_dict(routed().openapi())


@pytest.fixture
def served(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@schema.parametrize()
@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_server_error(case: schemathesis.Case, served: TestClient) -> None:
    answer = case.call(session=served)
    case.validate_response(answer, checks=[not_a_server_error])
