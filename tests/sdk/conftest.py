"""A server on simulated VMs in a process of its own, and both faces of the SDK with one way to use them."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import noid
import noid.sync
from noid.sync.face import Face
from noid.testing.reaper import clean
from noid.testing.served import PATIENCE_SECS, PROGRAM, SIMULATED
from noid.testing.simulated_agent import give_default_image


class LiveServer:
    """A server's process, which can be killed and started again. It logs into a file: a pipe would fill up."""

    def __init__(self, data_dir: Path) -> None:
        (data_dir / "server.toml").write_text(SIMULATED)
        give_default_image(data_dir)
        self._data_dir = data_dir
        self.socket = data_dir / "run" / "agent.sock"
        self.start()

    def start(self) -> None:
        reading, writing = os.pipe()
        words = ["serve", "--local", "--data-dir", str(self._data_dir), "--ready-fd", str(writing)]
        with (self._data_dir / "agent.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], pass_fds=[writing], stderr=log)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            assert pipe.read() == "ready\n", (self._data_dir / "agent.log").read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_SECS)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_SECS)


@pytest.fixture(scope="module")
def server(data_dir_root: Path) -> Iterator[LiveServer]:
    """A live server for a module."""
    data_dir = Path(tempfile.mkdtemp(prefix="", dir=data_dir_root))
    server = LiveServer(data_dir)
    try:
        yield server
    finally:
        server.close()
        clean(data_dir)


class Awaited:
    """An object of the synchronous face, used like the asynchronous one: what it does, it does in a thread."""

    def __init__(self, it: Any) -> None:
        self._it = it

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._it, name)
        if not callable(found):
            return found
        if inspect.iscoroutinefunction(inspect.unwrap(found)):
            return functools.partial(in_thread, found)
        return lambda *args, **kwargs: Awaited(found(*args, **kwargs))

    async def __aenter__(self) -> Any:
        return await in_thread(self._it.__enter__)

    async def __aexit__(self, *error: Any) -> None:
        await in_thread(self._it.__exit__, *error)

    def __aiter__(self) -> Awaited:
        return self

    async def __anext__(self) -> Any:
        end = object()
        item = await in_thread(next, self._it, end)
        if item is end:
            raise StopAsyncIteration
        return item


async def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what *function* does; what is of the synchronous face can be awaited then."""

    def awaitable(value: Any) -> Any:
        if isinstance(value, list):
            return [awaitable(item) for item in value]
        return Awaited(value) if isinstance(value, Face) else value

    return awaitable(await trio.to_thread.run_sync(functools.partial(function, *args, **kwargs)))


@pytest.fixture(params=["async", "sync"])
def connect(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """What makes a client of either face: both are used with ``await``."""
    if request.param == "async":
        return noid.Client
    return lambda *args, **kwargs: Awaited(noid.sync.Client(*args, **kwargs))


@pytest.fixture
async def client(connect: Callable[..., Any], server: LiveServer) -> AsyncIterator[Any]:
    """A client of either face, whose VMs are gone afterwards."""
    async with connect(socket=server.socket) as client:
        yield client
        with trio.move_on_after(PATIENCE_SECS, shield=True):
            for vm in await client.vms():
                await vm.destroy()


@pytest.fixture
async def vm(client: Any) -> Any:
    """A VM ``web``."""
    return await client.create("web", mem_mib=128)
