"""Requests that schemathesis makes of the OpenAPI document, right ones and wrong ones, against a live server.

None may be answered with a bug (500), a status, header, field or media type the document does not name, or with success
where the document forbids it. The server is the hardened one, on TCP, its VMs are simulated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from noid.server.openapi import document
from noid.server.serve import all_routes
from noid.testing.standing_server import standing_server

EXAMPLES = 8
"""How many requests are generated for an operation, of right ones and of wrong ones each."""

PATIENCE_SECS = 20.0
SHAPE = {"cpus": 1, "mem_mib": 128}

CHECKED = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def closed(described: dict[str, Any]) -> dict[str, Any]:
    """Return the document with answers that have no other fields than those it names."""
    strict = copy.deepcopy(described)

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(reference := node.get("$ref"), str) and "/schemas/" in reference:
                component = strict["components"]["schemas"][reference.rpartition("/")[2]]
                if "additionalProperties" not in component:
                    component["additionalProperties"] = False
                    close(component)
            if node.get("properties") and "additionalProperties" not in node:
                node["additionalProperties"] = False
            for below in node.values():
                close(below)
        elif isinstance(node, list):
            for below in node:
                close(below)

    del strict["security"]  # a right token is sent with each request; wrong ones are other tests' matter
    close(strict["components"]["responses"])
    for methods in strict["paths"].values():
        for operation in methods.values():
            close(operation["responses"])
    return strict


DOCUMENT = closed(document(all_routes(Mock(), Mock(), Mock())))
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [result.ok() for result in SCHEMA.get_all_operations()]


class Scene:
    """A server with a user who has one of everything that a name in a path can mean."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {token}"

    def ask(self, method: str, path: str, body: Any = None) -> requests.Response:
        """Ask, as a well-behaved client."""
        return self.session.request(method, self.url + path, json=body, timeout=PATIENCE_SECS)

    def set(self, wanted: set[str]) -> dict[str, str]:
        """Make what there is not, and return what the names in paths that are *wanted* shall be."""
        there = {"name": "web", "log": "console", "token": "spare", "user": "nobody", "port": "80"}
        for running in self.ask("GET", "/v1/operations?state=running").json():  # nobody has waited for it
            self.ask("GET", f"/v1/operations/{running['id']}?wait={PATIENCE_SECS:g}")
        if wanted & {"name", "operation"}:
            state = self.ask("GET", "/v1/vms/web").json().get("state")
            if state is None:
                assert self.ask("POST", "/v1/vms", {"name": "web", **SHAPE}).status_code == 201
            elif state != "running":
                assert self.ask("POST", f"/v1/vms/web/{'resume' if state == 'paused' else 'start'}").status_code == 200
        for kind, path, body in (
            ("process", "/v1/vms/web/processes", {"command": ["true"]}),
            ("checkpoint", "/v1/vms/web/checkpoints", {}),
        ):
            if kind in wanted:
                made = self.ask("POST", path, body)
                assert made.status_code == 201, made.text
                there[kind] = made.json()["id"]
        if "operation" in wanted:
            there["operation"] = self.ask("GET", "/v1/operations").json()[0]["id"]
        if "token" in wanted:
            self.ask("POST", "/v1/tokens", {"name": "spare"})
        assert wanted <= there.keys(), "say here how one comes to be"
        return {name: there[name] for name in wanted}


@pytest.fixture(scope="module")
def scene(data_dir_root: Path) -> Iterator[Scene]:
    """A live server, for all tests of this module."""
    with standing_server(data_dir_root, exec_timeout_secs=2.0) as server:
        _, token = server.do(server.agent.users.add, "alice")
        here = Scene(server.url, token)
        yield here
        here.session.close()


def varieties() -> Iterator[Any]:
    """Yield each operation with how its requests are made, where that makes sense."""
    for operation in OPERATIONS:
        name = operation.definition.raw["operationId"]
        yield pytest.param(operation, GenerationMode.POSITIVE, True, id=f"{name}-right")
        if operation.path_parameters.items:
            yield pytest.param(operation, GenerationMode.POSITIVE, False, id=f"{name}-of-anything")
        if operation.query.items or operation.body.items:
            yield pytest.param(operation, GenerationMode.NEGATIVE, True, id=f"{name}-wrong")


@pytest.mark.parametrize(("operation", "mode", "is_there"), list(varieties()))
def test_what_is_answered_is_what_the_document_says(
    scene: Scene, operation: Any, mode: GenerationMode, is_there: bool
) -> None:
    fixed: dict[str, Any] = {}
    if is_there:
        fixed["path_parameters"] = scene.set({parameter.name for parameter in operation.path_parameters})
    load_all_checks()
    checks = [CHECKS.get_one(name) for name in CHECKED]
    if mode is GenerationMode.NEGATIVE and operation.body.items and not operation.query.items:
        fixed |= {"query": {}, "headers": {}}  # so that it is the body that is wrong: words nobody knows are ignored
        checks.append(CHECKS.get_one("negative_data_rejection"))

    @given(case=operation.as_strategy(mode, **fixed))
    @settings(
        max_examples=EXAMPLES if is_there else EXAMPLES // 2, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def send(case: Any) -> None:
        if case.path == "/v1/events" and mode is GenerationMode.POSITIVE:
            case.query["timeout_secs"] = 0  # has no end either
        if case.query:
            case.query.pop("follow", None)  # has no end
            case.query.pop("after", None)  # waits
        answer = case.call(base_url=scene.url, session=scene.session, timeout=PATIENCE_SECS)
        assert answer.status_code != 500, answer.text
        case.validate_response(answer, checks=checks)

    send()
