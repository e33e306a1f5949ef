"""What these tests share: a server on a real agent with simulated VMs, on a unix socket and a port of its own."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from noid.core import wire
from noid.core.agent import Agent
from noid.core.config.settings import Config
from noid.core.model.processes import ExecRequest
from noid.core.opening import open_agent
from noid.core.plugins import Plugins
from noid.server import logformat
from noid.server.hardening import Settings
from noid.server.serve import serve_until
from noid.testing.faults import Faults
from noid.testing.raw_http import Answer, RawClient, open_ws
from noid.testing.served import PATIENCE_SECS, SIMULATED, Served
from noid.testing.simulated_agent import give_default_image, simulated_config, simulated_plugins

SHAPE: dict[str, Any] = {"cpus": 1, "mem_mib": 128}


class Log(logging.Handler):
    """Everything that was logged, down to debug, as JSON lines have it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[dict[str, Any]] = []
        self.secrets: set[str] = set()
        self.leaks: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(logformat.JsonFormatter().format(record)))
        if record.name.startswith("noid"):  # what the simulated guest's own libraries say is nobody's log
            everything = f"{logging.Formatter().format(record)} {record.__dict__}".replace("noid_tok_[hidden]", "")
            self.leaks += [everything for secret in (*self.secrets, "noid_tok_") if secret in everything]

    def of(self, request_id: str) -> list[dict[str, Any]]:
        """Return what was logged on behalf of a request."""
        return [line for line in self.lines if line.get("request") == request_id]

    async def request(self, request_id: str) -> dict[str, Any]:
        """Return the line of a request, which is there a moment after its answer."""
        with trio.fail_after(10):
            while not (found := [line for line in self.of(request_id) if "method" in line]):  # noqa: ASYNC110
                await trio.sleep(0.01)
        [line] = found
        return line


@pytest.fixture(autouse=True)
def log() -> Iterator[Log]:
    """Everything that is logged meanwhile. Afterwards no token and none of `secrets` may be among it."""
    root, log = logging.getLogger(), Log()
    level = root.level
    root.addHandler(log)
    root.setLevel(logging.DEBUG)
    yield log
    root.setLevel(level)
    root.removeHandler(log)
    assert log.leaks == []


class Quick(Settings):
    """The same limits, sooner."""

    graceful_timeout = 1.0
    write_timeout_secs = 0.5
    linger_secs = 0.5


class Exec:
    """One exec over a WebSocket, as a client sees it."""

    def __init__(self, ws: WebSocketConnection) -> None:
        self.ws = ws
        self.started: wire.Started | None = None

    async def message(self) -> str | bytes:
        """Return the next message but the one that says which process it is, which goes to `started`."""
        message = await self.ws.get_message()
        if isinstance(message, str) and isinstance(reply := wire.reply_from_json(message), wire.Started):
            self.started = reply
            return await self.message()
        return message

    async def ask(self, *argv: str, **fields: Any) -> None:
        """Send the request."""
        await self.ws.send_message(wire.request_to_json(ExecRequest(argv=argv, **fields)))

    async def feed(self, data: bytes) -> None:
        """Send input; none at all is its end."""
        await self.ws.send_message(wire.frame(wire.STDIN, data))

    async def next(self) -> tuple[int, bytes]:
        """Return channel and data of the next frame."""
        message = await self.message()
        assert isinstance(message, bytes), message
        return wire.split_frame(message)

    async def until(self, expected: bytes) -> None:
        """Read stdout until it ends with *expected*."""
        received = b""
        while not received.endswith(expected):
            channel, data = await self.next()
            assert channel == wire.STDOUT
            received += data

    async def result(self) -> tuple[dict[int, bytes], wire.ExecResult | wire.ErrorResponse, int]:
        """Return what came on each channel, how it ended, and the close code. There is exactly one last word."""
        output: dict[int, bytes] = {}
        while isinstance(message := await self.message(), bytes):
            channel, data = wire.split_frame(message)
            output[channel] = output.get(channel, b"") + data
        reply = wire.reply_from_json(message)
        assert isinstance(reply, wire.ExecResult | wire.ErrorResponse), message
        with pytest.raises(ConnectionClosed) as closed:
            await self.ws.get_message()
        return output, reply, closed.value.reason.code


class Server:
    """A live server, and every way to talk to it."""

    def __init__(self, agent: Agent, config: Config, faults: Faults) -> None:
        self.agent = agent
        self.config = config
        self.faults = faults
        self.stopping = trio.Event()
        self.stopped = trio.Event()
        self._clients = contextlib.AsyncExitStack()

    async def unix(self) -> RawClient:
        """Connect as the local user."""
        return await self._client(await trio.open_unix_socket(str(self.config.socket_path)))

    async def tcp(self) -> RawClient:
        """Connect as anybody."""
        return await self._client(await self._tcp_stream())

    async def _tcp_stream(self) -> trio.SocketStream:
        host, _, port = self.config.listen.rpartition(":")
        return await trio.open_tcp_stream(host, int(port))

    async def _client(self, stream: trio.SocketStream) -> RawClient:
        await self._clients.enter_async_context(stream)
        return RawClient(stream)

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask over a connection of its own: with *token* over TCP, without as the local user."""
        client = await (self.unix() if token is None else self.tcp())
        fields = {} if token is None else {"authorization": f"Bearer {token}"}
        answer = await client.ask(method, path, body, headers={**fields, **(headers or {})})
        await client.stream.aclose()
        return answer

    async def refused(self, method: str, path: str, body: Any = None, **kind: Any) -> tuple[int, str, str]:
        """Ask for what cannot be, and return status, code and text."""
        answer = await self.ask(method, path, body, **kind)
        fields = answer.json()
        assert set(fields) == {"error", "code"}
        assert answer.headers["x-noid-api-version"] == "1"
        return answer.status, fields["code"], fields["error"]

    async def create(self, name: str = "web", *, token: str | None = None) -> dict[str, Any]:
        """Make a VM."""
        answer = await self.ask("POST", "/v1/vms", {"name": name, **SHAPE}, token=token)
        assert answer.status == 201, answer.body
        return dict(answer.json())

    async def run(self, *argv: str, name: str = "web", **fields: Any) -> dict[str, Any]:
        """Run a command by POST."""
        answer = await self.ask("POST", f"/v1/vms/{name}/exec", {"command": list(argv), **fields})
        assert answer.status == 200, answer.body
        return dict(answer.json())

    @contextlib.asynccontextmanager
    async def exec(self, name: str = "web", *, token: str | None = None) -> AsyncIterator[Exec]:
        """Open an exec WebSocket."""
        if token is None:
            stream = await trio.open_unix_socket(str(self.config.socket_path))
        else:
            stream = await self._tcp_stream()
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        async with open_ws(stream, f"/v1/vms/{name}/exec", headers) as ws:
            yield Exec(ws)

    async def add_user(self, name: str) -> str:
        """Add a user and return its token."""
        return (await self.agent.users.add(name))[1]

    async def aclose(self) -> None:
        """Hang up."""
        await self._clients.aclose()


@pytest.fixture
def reserved_port() -> Iterator[int]:
    """A port nobody else is given: it stays bound here, which SO_REUSEADDR permits as long as nobody listens on it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def plugins_of() -> Callable[[Faults], Plugins]:
    """What the server's plugins are, given what shall go wrong in them. For test modules to replace."""
    return simulated_plugins


@pytest.fixture
async def server(
    data_dir: Path,
    reserved_port: int,
    plugins_of: Callable[[Faults], Plugins],
    request: pytest.FixtureRequest,
    nursery: trio.Nursery,
) -> AsyncIterator[Server]:
    """A live server. ``@pytest.mark.parametrize("server", [{...}], indirect=True)`` gives its `Config` fields."""
    give_default_image(data_dir)
    fields = {"local": False, "listen": f"127.0.0.1:{reserved_port}", **getattr(request, "param", {})}
    faults = Faults()
    config = simulated_config(data_dir, **fields)
    async with open_agent(config, plugins_of(faults)) as agent:
        server = Server(agent, config, faults)

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await serve_until(server.stopping, agent, config, ready=task_status.started, settings=Quick())
            server.stopped.set()

        await nursery.start(run)
        yield server
        await server.aclose()
        server.stopping.set()
        with trio.fail_after(10):
            await server.stopped.wait()
    gc.unfreeze()  # what the server declared permanent ends with it


@pytest.fixture
async def web(server: Server) -> Server:
    """A live server whose local user has a VM ``web``."""
    await server.create()
    return server


@pytest.fixture
def served(data_dir: Path) -> Iterator[Served]:
    (data_dir / "server.toml").write_text(SIMULATED)
    served = Served(data_dir)
    yield served
    for process in served.processes:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=PATIENCE_SECS)
        assert process.stderr is not None
        process.stderr.close()
