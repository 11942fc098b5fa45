"""Requests made from the OpenAPI document are answered as it says."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.errors import LoaderError
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.conftest import jpeg

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
schema = schemathesis.pytest.from_fixture("api_schema")


@pytest.fixture(scope="session")
def api_schema(api: TestClient) -> Any:
    """Give the service's document, with the service behind it."""
    try:
        return schemathesis.openapi.from_asgi("/openapi.json", api.app)
    except LoaderError as error:  # pragma: no cover
        raise AssertionError(f"the document cannot be read: {error}") from error


@schema.parametrize()
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_requests_made_from_the_document_are_answered_as_it_says(
    case: Any, api: TestClient
) -> None:
    answer = case.call(session=api)
    if answer.status_code == 503:  # a refusal is an answer, if it says when to come back
        assert answer.headers["Retry-After"]
    case.validate_response(answer, checks=CHECKS)


def test_the_document_has_examples_and_problems(api: TestClient) -> None:
    document = api.get("/openapi.json").json()
    assert {"/v1/score", "/v1/compare", "/v1/rank", "/v1/memory/cases"} <= document["paths"].keys()
    score = document["paths"]["/v1/score"]["post"]
    assert {"image/*", "multipart/form-data"} <= score["requestBody"]["content"].keys()
    assert "application/problem+json" in score["responses"]["503"]["content"]
    shapes = document["components"]["schemas"]
    assert shapes["AssessmentBody"]["example"]["score"]
    assert shapes["ProblemBody"]["example"]["type"] == "urn:meiqa:problem:overloaded"


def test_an_answer_has_every_field_that_is_documented(api: TestClient) -> None:
    answer = api.post("/v1/score?k=2", content=jpeg(1)).json()
    shapes = api.get("/openapi.json").json()["components"]["schemas"]
    assert set(shapes["AssessmentBody"]["properties"]) <= answer.keys()
