"""The SDK for programs that wait: ``from noid.sync import Client``.

Everything has the names, parameters and promises of `noid`, without ``await`` and ``async``, and is the same code: each
call takes the thread it was made on until it is done. Nothing here imports trio.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from noid.client.link import Link
from noid.client.waiting import Blocking, finished
from noid.sdk import checkpoint, client, temporary, vm
from noid.sync.face import Face, each, waited, wrapped

if TYPE_CHECKING:
    from noid.client.answers import CheckpointInfo, VmInfo
    from noid.client.settings import Endpoint
    from noid.sdk import connection, console, events, log, process, running
    from noid.sync.streams import Connection, Console, Events, Log, Process, RunningProcess

__all__ = [
    "Checkpoint",
    "Client",
    "Connection",
    "Console",
    "Events",
    "Log",
    "Process",
    "RunningProcess",
    "Temporary",
    "Vm",
]
_STREAMS = ("Connection", "Console", "Events", "Log", "Process", "RunningProcess")


def __getattr__(name: str) -> Any:
    """Import what only streams need when somebody names it."""
    if name not in _STREAMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from noid.sync import streams

    return getattr(streams, name)


def _running(it: running.RunningProcess) -> RunningProcess:
    from noid.sync.streams import RunningProcess

    return RunningProcess(it)


def _process(it: process.Process) -> Process:
    from noid.sync.streams import Process

    return Process(it)


def _connection(it: connection.Connection) -> Connection:
    from noid.sync.streams import Connection

    return Connection(it)


def _console(it: console.Console) -> Console:
    from noid.sync.streams import Console

    return Console(it)


def _log(it: log.Log) -> Log:
    from noid.sync.streams import Log

    return Log(it)


def _events(it: events.Events) -> Events:
    from noid.sync.streams import Events

    return Events(it)


def _vm(it: vm.Vm) -> Vm:
    return Vm(it)


class Checkpoint(Face[checkpoint.Checkpoint]):
    """See `noid.Checkpoint`."""

    @property
    def info(self) -> CheckpointInfo:
        """What the server said of it last."""
        return self._it.info

    @property
    def id(self) -> str:
        """Its id, 16 hex digits."""
        return self._it.id

    @property
    def vm_name(self) -> str:
        """The VM it was taken of."""
        return self._it.vm_name

    @property
    def label(self) -> str | None:
        """The text it was taken with."""
        return self._it.label

    restore = waited(checkpoint.Checkpoint.restore, _vm)
    fork = waited(checkpoint.Checkpoint.fork, _vm)
    set_labels = waited(checkpoint.Checkpoint.set_labels)
    remove = waited(checkpoint.Checkpoint.remove)


class Vm(Face[vm.Vm]):
    """See `noid.Vm`."""

    @property
    def info(self) -> VmInfo:
        """What the server said of it last, by this object; `refresh` asks anew."""
        return self._it.info

    @property
    def name(self) -> str:
        """Its name."""
        return self._it.name

    @property
    def state(self) -> str:
        """Its state as of the last answer."""
        return self._it.state

    refresh = waited(vm.Vm.refresh)
    stop = waited(vm.Vm.stop)
    start = waited(vm.Vm.start)
    reboot = waited(vm.Vm.reboot)
    pause = waited(vm.Vm.pause)
    resume = waited(vm.Vm.resume)
    rename = waited(vm.Vm.rename)
    set_labels = waited(vm.Vm.set_labels)
    destroy = waited(vm.Vm.destroy)
    checkpoint = waited(vm.Vm.checkpoint, Checkpoint)
    checkpoints = waited(vm.Vm.checkpoints, each(Checkpoint))
    restore = waited(vm.Vm.restore)
    fork = waited(vm.Vm.fork, each(_vm))
    run = waited(vm.Vm.run)
    exec = wrapped(vm.Vm.exec, _running)
    start_process = waited(vm.Vm.start_process, _process)
    processes = waited(vm.Vm.processes, each(_process))
    console = wrapped(vm.Vm.console, _console)
    logs = wrapped(vm.Vm.logs, _log)
    connect = wrapped(vm.Vm.connect, _connection)
    read_file = waited(vm.Vm.read_file)
    write_file = waited(vm.Vm.write_file)
    copy_in = waited(vm.Vm.copy_in)
    copy_out = waited(vm.Vm.copy_out)


class Temporary(Face[temporary.Temporary]):
    """See `noid.Client.temporary`."""

    def __enter__(self) -> Vm:
        """Make the VM."""
        return Vm(finished(self._it.__aenter__()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Destroy it, unless that was done."""
        finished(self._it.__aexit__(kind, error, traceback))


class Client(Face[client.Client]):
    """See `noid.Client`: ``with noid.sync.Client() as client: ...``. Threads may share one."""

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        socket: str | os.PathLike[str] | None = None,
        link: Link | None = None,
    ) -> None:
        """Choose a server as `noid.Client` does."""
        super().__init__(client.Client(link=link or Link(client.endpoint_of(url, token, socket), Blocking())))

    @classmethod
    def local(cls) -> Self:
        """Return a client of this user's own agent, whatever the configuration says."""
        from noid.client.settings import choose_endpoint

        return cls(link=Link(choose_endpoint(local=True), Blocking()))

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing: no connection outlives its call."""

    @property
    def endpoint(self) -> Endpoint:
        """The agent it talks to."""
        return self._it.endpoint

    perform = waited(client.Client.perform)
    request = waited(client.Client.request)
    whoami = waited(client.Client.whoami)
    create = waited(client.Client.create, _vm)
    temporary = wrapped(client.Client.temporary, Temporary)
    vms = waited(client.Client.vms, each(_vm))
    vm = waited(client.Client.vm, _vm)
    checkpoints = waited(client.Client.checkpoints, each(Checkpoint))
    events = wrapped(client.Client.events, _events)
