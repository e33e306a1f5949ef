"""Every route, whoever asks, whatever for: generated from the table, so that no route is without an owner's check.

Who: the owner, another tenant, a token without the scope, an expired one, a wrong one, none, and the local user. What
for: what is the owner's, what is somebody else's, what there is not. The last two are answered alike to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from noid.core.model.times import now
from noid.core.model.users import TOKEN_SCOPES, Scope
from noid.server.schemas.vocabulary import Content, Record
from noid.server.serve import all_routes
from noid.server.table import WS, Route
from noid.testing.raw_http import Answer
from noid.testing.standing_server import StandingServer, standing_server

ROUTES = all_routes(Mock(), Mock(), Mock())
GUARDED = [route for route in ROUTES if route.scope is not None]
OWNED = [route for route in GUARDED if route.names and route.scope in TOKEN_SCOPES]  # others only the local user asks

BODIES: dict[str, Any] = {
    "CreateVm": {"name": "fresh", "cpus": 1, "mem_mib": 128},
    "ChangeVm": {"labels": {"tier": "front"}},
    "TakeCheckpoint": {},
    "ChangeCheckpoint": {"label": "kept"},
    "RestoreCheckpoint": {"checkpoint_id": "0123456789abcdef", "new_name": "copy"},
    "StopVm": {"force": True},
    "Command": {"command": ["true"]},
    "Signal": {"signal": "TERM"},
    "CreateToken": {"name": "fresh"},
}
"""What a request of each record looks like. A route that takes another one needs a line here."""

QUERIES = {"files": "?path=/etc/hostname", "wait": "?timeout_secs=0", "events": "?timeout_secs=0"}
"""What must follow a path, by its last word."""

VARYING = {"x-request-id", "date"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Things:
    """What somebody has, by the name it has in paths."""

    names: Mapping[str, str]

    def path(self, route: Route) -> str:
        """Return the path of *route* to these, with the query it needs."""
        path = re.sub("<([a-z_]+)>", lambda found: self.names[found[1]], route.path)
        return path + QUERIES.get(route.path.rpartition("/")[2], "")

    def hide(self, body: bytes) -> bytes:
        """Return *body* without what tells these from others."""
        for kind, name in self.names.items():
            if kind == "port":
                continue  # nobody's in particular; and a digit, which other names may have in them
            body = body.replace(name.encode(), kind.encode())
        return body


UNKNOWN = Things(
    names={
        "name": "nothing", "process": "00000000", "port": "7", "log": "console", "checkpoint": "0123456789abcdef",
        "operation": "no-such-operation", "token": "no-such-token", "user": "nobody",
    }
)  # fmt: skip


class Cast:
    """The server, who asks it, and what there is."""

    def __init__(self, server: StandingServer) -> None:
        self.server = server
        users = server.agent.users
        alice, self.owner = server.do(users.add, "alice")
        _, self.other = server.do(users.add, "bob")
        self.without: dict[Scope, str] = {}
        for scope in TOKEN_SCOPES:
            rest = TOKEN_SCOPES - {scope}
            self.without[scope], _ = server.do(users.create_token, alice, f"without-{scope}", rest)
        past = now() - timedelta(seconds=1)
        self.expired, _ = server.do(users.create_token, alice, "expired", TOKEN_SCOPES, past)

        self._made: dict[str, str] = {}
        self.things = self.set()

    def set(self) -> Things:
        """Make what there is not any more, and return all that the owner has."""
        state = self.ask("GET", "/v1/vms/secret").get("state")
        if state is None:
            self.ask("POST", "/v1/vms", {**BODIES["CreateVm"], "name": "secret"})
        elif state != "running":
            self.ask("POST", f"/v1/vms/secret/{'resume' if state == 'paused' else 'start'}")
        lists = {"process": "/v1/vms/secret/processes", "checkpoint": "/v1/vms/secret/checkpoints"}
        for kind, path in lists.items():
            if self._made.get(kind) not in {thing["id"] for thing in self.ask("GET", path)}:
                self._made[kind] = self.ask("POST", path, {"command": ["true"]} if kind == "process" else None)["id"]
        if "spare" not in {token["name"] for token in self.ask("GET", "/v1/tokens")}:
            self.ask("POST", "/v1/tokens", {"name": "spare"})
        for path in ("/v1/vms/fresh", "/v1/vms/copy", "/v1/tokens/fresh"):
            self.server.ask("DELETE", path, token=self.owner)
        self._made["operation"] = self.ask("GET", "/v1/operations?vm=secret")[0]["id"]
        return Things(names={**UNKNOWN.names, "name": "secret", "token": "spare", **self._made})

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask as the owner, and return what is said."""
        return self.server.ask(method, path, body, token=self.owner).json()


@pytest.fixture(scope="module")
def cast(data_dir_root: Path) -> Iterator[Cast]:
    with standing_server(data_dir_root) as server:
        yield Cast(server)


def body_of(route: Route) -> Any:
    """Return something *route* takes."""
    content = route.body
    if isinstance(content, Content):
        if "application/json" not in content.media:
            return b"x"
        content = content.media["application/json"]
    if content is None:
        return None
    assert isinstance(content, Record)
    assert content.name in BODIES, f"say in BODIES what a {content.name} looks like"
    return BODIES[content.name]


def without_what_varies(answer: Answer, things: Things) -> tuple[int, dict[str, str], bytes]:
    fields = {name: value for name, value in answer.headers.items() if name not in VARYING}
    hidden = UNKNOWN.hide(things.hide(answer.body))
    return answer.status, fields | {"content-length": str(len(hidden))}, hidden


@pytest.mark.parametrize("route", GUARDED, ids=lambda route: route.endpoint)
def test_without_a_valid_token_nothing_is_told(cast: Cast, route: Route) -> None:
    there, body = cast.things if route.names else UNKNOWN, body_of(route)
    address = f"127.1.0.{GUARDED.index(route) + 1}"  # of each route's own: failures are counted by address
    for token in (None, cast.expired, "noid_tok_" + "0" * 64):
        answers = [
            cast.server.ask(route.method, things.path(route), body, token=token, address=address)
            for things in (there, UNKNOWN)
        ]
        assert [answer.status for answer in answers] == [401, 401]
        assert answers[0].body == answers[1].body
        assert answers[0].headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("route", GUARDED, ids=lambda route: route.endpoint)
def test_a_token_without_the_scope_is_told_which_it_lacks_and_nothing_else(cast: Cast, route: Route) -> None:
    assert route.scope is not None
    there, body = cast.things if route.names else UNKNOWN, body_of(route)
    token = cast.without.get(route.scope, cast.owner)  # nobody's token has what only the local user has
    answers = [cast.server.ask(route.method, things.path(route), body, token=token) for things in (there, UNKNOWN)]
    assert [(answer.status, answer.json()["code"]) for answer in answers] == [(403, "scope")] * 2
    assert answers[0].body == answers[1].body
    assert route.scope in answers[0].json()["error"]


@pytest.mark.parametrize("route", OWNED, ids=lambda route: route.endpoint)
def test_what_is_somebody_elses_and_what_there_is_not_are_answered_alike(cast: Cast, route: Route) -> None:
    there, body = cast.things, body_of(route)
    for local in (False, True):
        who: dict[str, Any] = {"local": True} if local else {"token": cast.other}
        foreign, unknown = (
            without_what_varies(cast.server.ask(route.method, things.path(route), body, **who), things)
            for things in (there, UNKNOWN)
        )
        assert foreign == unknown
        assert foreign[0] == (426 if 426 in route.answers else 404)


@pytest.mark.parametrize("route", OWNED, ids=lambda route: route.endpoint)
def test_the_owner_is_answered_with_what_the_table_says(cast: Cast, route: Route) -> None:
    there = cast.set()
    body = body_of(route)
    if isinstance(body, dict) and "checkpoint_id" in body:
        body = {**body, "checkpoint_id": there.names["checkpoint"]}
    answer = cast.server.ask(route.method, there.path(route), body, token=cast.owner)
    cannot = answer.status == 501 and "simulated" in answer.json()["error"]
    cannot |= answer.status == 409 and route.path.endswith("/cancel")  # it has ended
    assert answer.status in route.answers or cannot, answer.body


@pytest.mark.parametrize(
    "route",
    [r for r in GUARDED if not r.names and r.method == "GET" and r.scope in TOKEN_SCOPES],
    ids=lambda route: route.endpoint,
)
def test_what_is_told_of_everything_tells_nothing_of_others(cast: Cast, route: Route) -> None:
    there = cast.set()
    told = cast.server.ask(route.method, there.path(route), token=cast.other)
    assert told.status in route.answers or told.json()["code"] == "scope"
    for secret in (*there.names.values(), "alice"):
        if secret not in UNKNOWN.names.values():
            assert secret.encode() not in told.body


def test_a_part_of_somebody_elses_vm_is_not_reached_through_ones_own(cast: Cast) -> None:
    there = cast.set()
    made = cast.server.ask("POST", "/v1/vms", {**BODIES["CreateVm"], "name": "mine"}, token=cast.other)
    assert made.status == 201
    for route in OWNED:
        parts = [name for name in route.names[1:] if there.names[name] != UNKNOWN.names[name]]
        if route.names[0] != "name" or not parts or 426 in route.answers:
            continue
        foreign, unknown = (Things(names={**things.names, "name": "mine"}) for things in (there, UNKNOWN))
        answers = [
            without_what_varies(cast.server.ask(route.method, t.path(route), body_of(route), token=cast.other), t)
            for t in (foreign, unknown)
        ]
        assert answers[0] == answers[1], route.endpoint
        assert answers[0][0] == 404, route.endpoint


def test_every_route_that_needs_a_websocket_is_tried_with_one() -> None:
    assert {route.path for route in OWNED if route.method == WS} == {r.path for r in ROUTES if r.method == WS}
