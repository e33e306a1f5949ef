"""A server on simulated VMs in a thread of its own: for tests that block, and for modules whose tests share one."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import trio

from noid.core.agent import Agent
from noid.core.config.settings import Config
from noid.core.opening import open_agent
from noid.server.serve import serve_until
from noid.testing.raw_http import Answer
from noid.testing.reaper import clean
from noid.testing.simulated_agent import give_default_image, simulated_config, simulated_plugins

T = TypeVar("T")

PATIENCE_SECS = 30.0

_UPGRADE = {
    "connection": "upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


class StandingServer:
    """How a test talks to the server: over TCP with a token, or as the local user; and to its agent directly."""

    def __init__(self, agent: Agent, config: Config, trio_token: trio.lowlevel.TrioToken) -> None:
        self.agent = agent
        self.config = config
        self._trio_token = trio_token

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.config.listen}"

    def do(self, call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Have the agent's loop do something, and return what came of it."""
        return trio.from_thread.run(call, *arguments, trio_token=self._trio_token)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        local: bool = False,
        address: str = "127.0.0.1",
    ) -> Answer:
        """Ask over a connection of its own, from *address*, as whose *token* that is or as the *local* user.

        *body* is sent as JSON unless it is bytes. The method ``WS`` asks for an upgrade.
        """
        if local:
            connection: http.client.HTTPConnection = _Local(self.config.socket_path)
        else:
            connection = http.client.HTTPConnection(
                self.config.listen, timeout=PATIENCE_SECS, source_address=(address, 0)
            )
        headers: dict[str, str] = {} if token is None else {"authorization": f"Bearer {token}"}
        if method == "WS":
            method, headers = "GET", headers | _UPGRADE
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, content, headers)
            reply = connection.getresponse()
            fields: Mapping[str, str] = {name.lower(): value for name, value in reply.getheaders()}
            return Answer(status=reply.status, headers=fields, body=b"" if reply.status == 101 else reply.read())


class _Local(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("noid")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_SECS)
        self.sock.connect(str(self._path))


@contextlib.contextmanager
def standing_server(root: Path, **fields: Any) -> Iterator[StandingServer]:
    """Run a server in a new directory below *root* (the fixture ``data_dir_root``). *fields* are those of `Config`.

    Raises:
        RuntimeError: it does not start, or does not end.
    """
    directory = Path(tempfile.mkdtemp(prefix="", dir=root))
    give_default_image(directory)
    ready = threading.Event()
    found: list[StandingServer] = []
    stopping = trio.Event()

    with socket.socket() as reserved:  # nobody else is given the port meanwhile
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        config = simulated_config(directory, **{"local": False, "listen": address, **fields})

        async def run() -> None:
            async with open_agent(config, simulated_plugins()) as agent:
                found.append(StandingServer(agent, config, trio.lowlevel.current_trio_token()))
                await serve_until(stopping, agent, config, ready=ready.set)

        thread = threading.Thread(target=trio.run, args=(run,), name="standing server", daemon=True)
        thread.start()
        try:
            if not ready.wait(PATIENCE_SECS):
                raise RuntimeError("the server does not start")
            yield found[0]
        finally:
            if found:
                with contextlib.suppress(trio.RunFinishedError):
                    found[0]._trio_token.run_sync_soon(stopping.set)
            thread.join(PATIENCE_SECS)
            clean(directory)
            gc.unfreeze()  # what the server declared permanent ends with it
    if thread.is_alive():
        raise RuntimeError("the server does not end")
