"""The OpenAPI document: it is one, it knows every route, and no route is in the table without saying what it does."""

from __future__ import annotations

import inspect
import re
from typing import Any
from unittest.mock import Mock

import jsonschema_rs
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31

from noid.core.model.names import checked_name
from noid.core.model.users import Scope
from noid.errors import InvalidRequest
from noid.server.docs_page import page
from noid.server.openapi import document, said
from noid.server.schemas import paths
from noid.server.schemas.failures import error_statuses
from noid.server.schemas.vocabulary import Record, array, extended, integer, nullable, record, text
from noid.server.serve import all_routes
from noid.server.table import WS, Route

Server = Any  # see conftest.py

ROUTES = all_routes(Mock(), Mock(), Mock())
DOCUMENT = document(ROUTES)

# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.endpoint)
def test_a_route_says_what_it_does_takes_and_answers(route: Route) -> None:
    summary, _ = said(route)
    assert summary.endswith((".", ":")) or len(summary) > 10, "its handler has no docstring"
    assert route.answers, "what does it answer?"
    assert all(100 <= status < 400 or status == 426 for status in route.answers), "failures belong in errors="
    assert route.failures <= error_statuses().keys(), "a failure that no error has"
    assert (101 in route.answers) == (route.method == WS)
    assert set(route.names) <= paths.PATH_PARAMETERS.keys(), "say in noid.server.schemas.paths what its names are"
    assert list(inspect.signature(route.handler).parameters) == list(route.names)
    if route.method in ("POST", "PATCH", "PUT", "DELETE"):
        assert route.scope in (Scope.EXEC, Scope.MANAGE, Scope.ADMIN, None), "looking changes nothing"


@pytest.mark.parametrize("route", [r for r in ROUTES if r.method != WS], ids=lambda route: route.endpoint)
def test_a_handler_reads_from_the_query_only_what_its_route_names(route: Route) -> None:
    read = re.findall(r"""request\.args(?:\.get\(|\.getlist\(|\[)["'](\w+)""", inspect.getsource(route.handler))
    assert set(read) <= {name.removesuffix("?") for name in route.query}


# --- the document ----------------------------------------------------------------------------------------------------


def test_the_document_is_valid_openapi_3_1() -> None:
    assert [str(error) for error in jsonschema_rs.Draft202012Validator(OPENAPI_31).iter_errors(DOCUMENT)] == []
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_every_route_is_in_the_document_once() -> None:
    described = {(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == {
        ("get" if r.method == WS else r.method.lower(), re.sub("<(.*?)>", r"{\1}", r.path)) for r in ROUTES
    }
    ids = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


def test_every_reference_leads_somewhere() -> None:
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(reference := node.get("$ref"), str):
                found: Any = DOCUMENT
                for step in reference.removeprefix("#/").split("/"):
                    found = found[step]
            for below in node.values():
                walk(below)
        elif isinstance(node, list):
            for below in node:
                walk(below)

    walk(DOCUMENT)


def test_a_websocket_is_its_gets_answer_101_with_both_queries() -> None:
    operation = DOCUMENT["paths"]["/v1/vms/{name}/logs/{log}"]["get"]
    assert {"101", "200", "206", "404", "503"} <= operation["responses"].keys()
    assert {"follow", "offset"} <= {parameter["name"] for parameter in operation["parameters"]}
    assert {"101", "426"} <= DOCUMENT["paths"]["/v1/vms/{name}/exec"]["get"]["responses"].keys()


def test_a_scope_a_path_and_a_body_bring_their_failures() -> None:
    open_to_all, create = DOCUMENT["paths"]["/healthz"]["get"], DOCUMENT["paths"]["/v1/vms"]["post"]
    assert (open_to_all["security"], set(open_to_all["responses"])) == ([], {"200", "500"})
    assert {"400", "401", "403", "408", "409", "413", "429", "500", "507"} <= create["responses"].keys()
    assert create["x-noid-scope"] == "manage"
    assert "404" in DOCUMENT["paths"]["/v1/vms/{name}"]["get"]["responses"]


def test_two_schemas_of_one_name_and_a_name_nobody_explains_are_refused() -> None:
    async def handler() -> None:
        """Do nothing."""

    same = record("Vm", "Not the same.", {})
    with pytest.raises(ValueError, match="two schemas are called Vm"):
        document([*ROUTES, Route(method="GET", path="/x", handler=handler, answers={200: same})])
    with pytest.raises(ValueError, match="what <thing> is"):
        document([Route(method="GET", path="/x/<thing>", handler=handler, answers={200: None})])


async def test_the_document_is_served_without_a_token(server: Server) -> None:
    answer = await (await server.tcp()).ask("GET", "/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == DOCUMENT


async def test_the_page_for_people_has_everything_and_needs_nothing(server: Server) -> None:
    answer = await (await server.tcp()).ask("GET", "/docs")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    text = answer.body.decode()
    ids = re.findall(r'id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    operations = [operation for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert {*(operation["operationId"] for operation in operations)} <= set(ids)
    assert {f"schema-{name}" for name in DOCUMENT["components"]["schemas"]} <= set(ids)
    assert "`" not in text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.findall(r"<script|src=|https?://", text)


def test_the_page_escapes_what_it_shows() -> None:
    async def handler() -> None:
        """Say ``<b>`` & more."""

    text = page(document([Route(method="GET", path="/x", handler=handler, answers={200: None})]))
    assert "<code>&lt;b&gt;</code> &amp; more." in text


# --- the vocabulary --------------------------------------------------------------------------------------------------


def test_fields_that_end_in_a_question_mark_may_be_missing() -> None:
    base = record("A", "An A.", {"x": integer(1), "y?": text()})
    more = extended("B", "A B.", base, {"z": nullable(base), "w?": array(base)})
    assert (base.schema["required"], list(base.schema["properties"])) == (["x"], ["x", "y"])
    assert more.schema["required"] == ["x", "z"]
    assert isinstance(more.schema["properties"]["w"]["items"], Record)
    assert nullable(text(), about="t") == {"type": ["string", "null"], "description": "t"}


@pytest.mark.parametrize("name", ["a", "_", "a.b", "a.", "a-b", "0", "x" * 64, ".a", "-a", "a..b", "a b", "", "x" * 65])
def test_the_schema_of_a_name_and_its_check_agree(name: str) -> None:
    fits = re.search(paths.NAME_PATTERN, name) is not None and 1 <= len(name) <= 64
    try:
        checked_name(name)
    except InvalidRequest:
        assert not fits
    else:
        assert fits
