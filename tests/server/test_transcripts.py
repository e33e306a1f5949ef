"""The protocol's documentation is true: every transcript, played to a live server; and there is one for everything."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import trio

from noid.core.config import Config
from noid.core.config_reading import build_record
from noid.core.config_spellings import settled
from noid.errors import NoSpace
from noid.server.schemas import failures
from noid.server.serve import all_routes
from noid.server.table import WS, Route
from noid.testing.faults import fail, hang
from noid.testing.transcript import KINDS, Given, Request, Response, Step, parse, pattern
from noid.testing.transcript_player import Player

Server = Any  # see conftest.py

TRANSCRIPTS = sorted((Path(__file__).parents[1] / "transcripts").glob("*.txt"))
SHAPE = {"cpus": 1, "mem_mib": 128}


class Stage:
    """A live server with simulated VMs."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._tokens: dict[str, str] = {}

    async def connect(self, *, local: bool) -> trio.SocketStream:
        """Return a new connection to it."""
        if local:
            return await trio.open_unix_socket(str(self._server.config.socket_path))
        host, _, port = self._server.config.listen.rpartition(":")
        return await trio.open_tcp_stream(host, int(port))

    async def given(self, words: str) -> Mapping[str, str]:
        """Make what *words* say."""
        if words.startswith("server.toml "):
            return {}  # the server was made with it
        if words == "the server stops":
            self._server.stopping.set()
            return {}
        if words == "the disk is full":
            self._server.faults.arm("capture", fail(NoSpace("the disk is full")))
            return {}
        if words == "the next checkpoint takes for ever":
            self._server.faults.arm("capture", hang)
            return {}
        if found := re.fullmatch(r"user ([a-z]+)", words):
            self._tokens[found[1]] = await self._server.add_user(found[1])
            return {found[1]: self._tokens[found[1]]}
        if found := re.fullmatch(r"vm ([a-z]+) of ([a-z]+)", words):
            answer = await self._server.ask(
                "POST", "/v1/vms", {"name": found[1], **SHAPE}, token=self._tokens[found[2]]
            )
            assert answer.status == 201, answer.body
            return {}
        raise ValueError(f"nobody knows what is meant by: {words}")


def settings(steps: list[Step]) -> dict[str, Any]:
    """Return what the lines of server.toml that a transcript needs set."""
    said = [step.words for step in steps if isinstance(step, Given)]
    lines = [words.removeprefix("server.toml ") for words in said if words.startswith("server.toml ")]
    table, _ = settled(tomllib.loads("\n".join(lines)), "transcript")
    config = build_record(Config, {"data_dir": "/nowhere", **table}, "transcript")
    return {key: getattr(config, key) for key in table}


def played() -> Iterator[Any]:
    for path in TRANSCRIPTS:
        steps = parse(path.read_text())
        yield pytest.param(settings(steps), steps, id=path.stem)


@pytest.mark.parametrize(("server", "steps"), list(played()), indirect=["server"])
async def test_what_a_transcript_says_happens(server: Server, steps: list[Step]) -> None:
    await Player(Stage(server)).play(steps)


# --- there is one for everything ---------------------------------------------------------------------------------

NOT_SHOWN = {
    "GET /v1/vms/<name>/files": {200: "simulated guests have no files", 206: "as 200", 416: "as 200"},
    "PUT /v1/vms/<name>/files": {200: "as GET"},
}
"""Answers of routes that no transcript shows, and why."""

NOT_YET: frozenset[str] = frozenset()
"""Endpoints whose transcripts are still to be written."""

ONCE_IS_ENOUGH = frozenset({409, 501, 503, 507}).union(
    failures.OF_A_SCOPE, failures.OF_A_NAME_IN_THE_PATH, failures.OF_A_QUERY, failures.OF_A_BODY
)
"""Failures that look alike on every route: one transcript shows each."""

NEVER_SHOWN = {
    500: "a bug, or a backend that fails: the text differs, the form does not",
    504: "a guest that does not answer: it would take as long as noid waits",
    408: "a body that takes longer than 30 s",
}


def shown() -> set[tuple[str, int]]:
    """Return endpoint and status of every answer that a transcript shows, with what nobody's endpoint is called."""
    found = set()
    for path in TRANSCRIPTS:
        request: Request | None = None
        for step in parse(path.read_text()):
            if isinstance(step, Request):
                request = step
            elif isinstance(step, Response) and request is not None:
                found.add((endpoint(request), step.status))
    return found


def endpoint(request: Request) -> str:
    """Return whose route *request* is for."""
    path = re.sub(r"<[a-z0-9-]+>", "x", request.target.partition("?")[0]).rstrip("/")
    method = WS if request.upgrades else request.method
    for route in ROUTES:
        templates = (re.sub(r"<[a-z_]+>", "[^/]+", template) for template in route.paths)
        if route.method == method and any(re.fullmatch(template, path) for template in templates):
            return route.endpoint
    return "nobody"


ROUTES = all_routes(Mock(), Mock(), Mock())
SHOWN = shown()


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.endpoint not in NOT_YET], ids=lambda route: route.endpoint
)
def test_every_answer_of_a_route_is_in_a_transcript(route: Route) -> None:
    wanted = {*route.answers, *(status for status in route.errors if status not in {*ONCE_IS_ENOUGH, *NEVER_SHOWN})}
    missing = {status for status in wanted if (route.endpoint, status) not in SHOWN}
    assert missing == set(NOT_SHOWN.get(route.endpoint, {})), f"tests/transcripts shows no {route.endpoint} {missing}"


def test_every_failure_is_in_a_transcript() -> None:
    everything = {status for route in ROUTES for status in route.failures}
    assert everything - {status for _, status in SHOWN} == NEVER_SHOWN.keys()


def test_a_placeholder_stands_for_what_the_readme_says() -> None:
    readme = (TRANSCRIPTS[0].parent / "README.md").read_text()
    words = {
        word
        for row in re.findall(r"^\| (`[a-z0-9`, ]+`) \|", readme, re.MULTILINE)
        for word in re.findall("[a-z0-9]+", row)
    }
    assert words == set(KINDS)
    assert pattern("a <id:hex8> <id-2>...", {"id-2": "."}).fullmatch("a 0123abcd .!")
    assert not pattern("a <hex8>.", {}).fullmatch("a 0123abcd!")


@pytest.mark.parametrize("text", ["hello", "> hello", "< HTTP/2 200", "< HTTP/1.1 200\n< nonsense"])
def test_what_is_no_transcript_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^line \d+: "):
        parse(f"# explanation\n{text}")
