"""Requests made from the OpenAPI document are answered as it says."""

from __future__ import annotations

from typing import Any

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.conftest import Started, jpeg

CHECKS = [
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
BUSY = 503
OPERATIONS = 12


def test_requests_made_from_the_document_are_answered_as_it_says(started: Started) -> None:
    _, url = started("--budget-ms", "30000")
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == OPERATIONS
    answered: dict[str, set[int]] = {}

    def check(case: Any) -> None:
        answer = case.call(base_url=url)
        answered.setdefault(case.path, set()).add(answer.status_code)
        # A refusal is an answer, if it says when to come back.
        checks = CHECKS if answer.status_code == BUSY else [*CHECKS, not_a_server_error]
        assert answer.status_code != BUSY or answer.headers["retry-after"]
        case.validate_response(answer, checks=checks)

    for operation in operations:
        settings(
            max_examples=10,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(case=operation.as_strategy())(check))()
    assert 422 in answered["/v1/score"]
    assert 200 in answered["/v1/memory/cases"]
    assert 403 in answered["/v1/memory/cases"]


def test_the_document_has_examples_and_problems(api: TestClient) -> None:
    document = api.get("/openapi.json").json()
    assert {"/v1/score", "/v1/compare", "/v1/options", "/v1/rank", "/v1/memory/cases"} <= document[
        "paths"
    ].keys()
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
