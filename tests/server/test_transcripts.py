"""The protocol's documentation is true: every transcript, played to a live server; and there is one for everything."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import trio

from noid.core.config.reading import build_record
from noid.core.config.settings import Config
from noid.core.config.spellings import settled
from noid.core.guests import face as guests
from noid.core.plugins import Plugins
from noid.errors import BackendError, DependencyDown, NoSpace
from noid.server import serve
from noid.server.schemas import failures
from noid.server.serve import all_routes
from noid.server.table import WS, Route
from noid.testing.faults import Faults, fail, hang
from noid.testing.guest_files import agent_program, plugins_with_files
from noid.testing.simulated_agent import simulated_plugins
from noid.testing.transcript import KINDS, Given, Request, Response, Step, parse, pattern
from noid.testing.transcript_player import Player

Server = Any  # see conftest.py

TRANSCRIPTS = sorted((Path(__file__).parents[1] / "transcripts").glob("*.txt"))
SHAPE = {"cpus": 1, "mem_mib": 128}
FILES = "guests have files"
HASTE = "nobody waits longer than half a second"
BEFOREHAND = (FILES, HASTE)
"""What has to be known before there is a server."""


class Stage:
    """A live server with simulated VMs."""

    def __init__(self, server: Server, directory: Path) -> None:
        self._server = server
        self._directory = directory
        self._tokens: dict[str, str] = {}

    async def connect(self, *, local: bool) -> trio.SocketStream:
        """Return a new connection to it."""
        if local:
            return await trio.open_unix_socket(str(self._server.config.socket_path))
        host, _, port = self._server.config.listen.rpartition(":")
        return await trio.open_tcp_stream(host, int(port))

    async def given(self, words: str) -> Mapping[str, str]:
        """Make what *words* say."""
        if words.startswith("server.toml ") or words in BEFOREHAND:
            return {}  # the server was made with it
        if words == "a directory of the guest":
            (self._directory / "hello").write_bytes(b"hello world\n")
            (self._directory / "closed").mkdir()
            return {"directory": str(self._directory)}
        if words == "the server stops":
            self._server.stopping.set()
            return {}
        if words == "the disk is full":
            self._server.faults.arm("capture", fail(NoSpace("the disk is full")))
            return {}
        if words == "the storage fails":
            self._server.faults.arm("capture", fail(BackendError("cannot freeze: input/output error")))
            return {}
        if words == "a bug":
            self._server.faults.arm("capture", fail(ZeroDivisionError("what only the log may know")))
            return {}
        if found := re.fullmatch(r"the guest of ([a-z]+)'s ([a-z]+) does not answer", words):
            answer = await self._server.ask("GET", f"/v1/vms/{found[2]}", token=self._tokens[found[1]])
            link = self._server.agent.services.supervisor.find(answer.json()["id"]).link
            for nth in (1, 2, 3):
                self._server.faults.arm("ping", hang, nth=nth)
            assert not await link.health.ask(link, 0.01)
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


def said(steps: list[Step]) -> set[str]:
    """Return what a transcript says that there is."""
    return {step.words for step in steps if isinstance(step, Given)}


@pytest.fixture
def plugins_of(
    steps: list[Step], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Faults], Plugins]:
    """Replaces the one of conftest.py; the server is made with it, so whatever is needed beforehand happens here."""
    if HASTE in said(steps):
        monkeypatch.setattr(serve, "BODY_TIMEOUT_SECS", 0.5)
        monkeypatch.setattr(guests, "RECOVERED_SECS", 0.5)
    if FILES not in said(steps):
        return simulated_plugins
    try:
        return partial(plugins_with_files, program=agent_program(tmp_path_factory.mktemp("agent")))
    except DependencyDown as error:
        pytest.skip(f"no guest agent: {error}")


def settings(steps: list[Step]) -> dict[str, Any]:
    """Return what the lines of server.toml that a transcript needs set."""
    lines = [words.removeprefix("server.toml ") for words in said(steps) if words.startswith("server.toml ")]
    table, _ = settled(tomllib.loads("\n".join(lines)), "transcript")
    config = build_record(Config, {"data_dir": "/nowhere", **table}, "transcript")
    return {key: getattr(config, key) for key in table}


def played() -> Iterator[Any]:
    for path in TRANSCRIPTS:
        steps = parse(path.read_text())
        yield pytest.param(settings(steps), steps, id=path.stem)


@pytest.mark.parametrize(("server", "steps"), list(played()), indirect=["server"])
async def test_what_a_transcript_says_happens(server: Server, steps: list[Step], tmp_path: Path) -> None:
    await Player(Stage(server, tmp_path)).play(steps)


# --- there is one for everything ---------------------------------------------------------------------------------

ONCE_IS_ENOUGH = frozenset({409, 500, 501, 503, 504, 507}).union(
    failures.OF_A_SCOPE, failures.OF_A_NAME_IN_THE_PATH, failures.OF_A_QUERY, failures.OF_A_BODY
)
"""Failures that look alike on every route: one transcript shows each."""


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


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.endpoint)
def test_every_answer_of_a_route_is_in_a_transcript(route: Route) -> None:
    wanted = {*route.answers, *(route.errors - ONCE_IS_ENOUGH)}
    missing = {status for status in wanted if (route.endpoint, status) not in SHOWN}
    assert not missing, f"tests/transcripts shows no {route.endpoint} {missing}"


def test_every_failure_is_in_a_transcript() -> None:
    everything = {status for route in ROUTES for status in route.failures}
    assert everything <= {status for _, status in SHOWN}


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
