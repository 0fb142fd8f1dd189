"""The OpenAPI document against the service, by schemathesis: no fault, and every answer is one that is described."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import numpy as np
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, not_a_server_error

from tests.service.conftest import MASK, PICTURE
from tests.service.test_native import finish, post
from tests.support.fake_service import Running, make_png

ERASED = make_png(np.dstack([PICTURE, 255 - MASK]))

NAMES = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def described() -> Iterator[Running]:
    with Running(waiting=1000, keep_results=1000) as service:
        yield service


def test_every_answer_is_described(described: Running) -> None:
    seen: dict[str, set[int]] = {}
    with httpx.Client(base_url=described.url) as client:
        known = post(client).json()["id"]
        finish(client, known)
    schema = schemathesis.openapi.from_url(f"{described.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        attack(operation, known, seen.setdefault(operation.label, set()))
    assert len(seen) >= 20 and not [name for name, statuses in seen.items() if not statuses]
    assert {200, 404} <= seen["GET /v1/jobs/{id}/images/{k}"] and 202 in seen["POST /v1/jobs"]
    assert 200 in seen["GET /v1/jobs/{id}"] & seen["GET /v1/jobs/{id}/events"] & seen["POST /v1/images/edits"]


def attack(operation: Any, known: str, seen: set[int]) -> None:
    """Send an operation what its schema allows and what it does not; every second time with a job and pictures that
    are there."""
    chosen = [not_a_server_error, *CHECKS.get_by_names(NAMES)]

    @hypothesis.given(case=operation.as_strategy(), helped=st.booleans())
    @hypothesis.settings(
        max_examples=16,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(case: schemathesis.Case, helped: bool) -> None:
        if helped and "{id}" in case.path and case.method != "DELETE":
            case.path_parameters |= {"id": known} | ({"k": 0} if "{k}" in case.path else {})
        if helped and case.path == "/v1/jobs":
            case.body = {"image": ERASED, "request": '{"prompt": "a"}'}
        if helped and case.path == "/v1/images/edits":
            case.body = {"image": ERASED, "prompt": "a"}
        if helped and case.path == "/sdapi/v1/img2img" and isinstance(case.body, dict):
            case.body["init_images"] = [base64.b64encode(ERASED).decode()]
        seen.add(case.call_and_validate(checks=chosen, timeout=20).status_code)

    check()
