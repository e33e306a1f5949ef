"""The agent in a guest, as the core sees it: processes, identity, power. `connection` is how it is spoken to."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from noid.core.backends import Process
from noid.core.model.connections import ConnectRequest
from noid.core.model.files import FileTransfer
from noid.core.model.guest_processes import GuestProcessInfo
from noid.core.model.processes import LABEL_BYTES_MAX, LOG_BYTES_MAX, LOG_BYTES_MIN, ExecRequest, TerminalSize
from noid.core.model.vms import Identity, Receipt
from noid.errors import BackendError, InvalidRequest, TooLarge, Unsupported
from noid_exec_vsock import frames, tunnel
from noid_exec_vsock.connection import Connection, parsed
from noid_exec_vsock.frames import Hello, Message
from noid_exec_vsock.process import OUTPUT_WINDOW_BYTES, GuestProcess
from noid_exec_vsock.transfer import transfer_argv
from noid_exec_vsock.tunnel import Tunnel

_log = logging.getLogger(__name__)

GRACE_SECS = 2.0
_RELEASE_BOUND_SECS = GRACE_SECS + 10.0
_USER_BYTES_MAX = 63
_CWD_BYTES_MAX = 4095
_CONSOLE = 0
_FEATURES = frozenset({"sessions", "tty", "signals", "stdin", "stderr", "files", "identity", "power"})


@asynccontextmanager
async def connect(open_stream: Callable[[], Awaitable[trio.abc.Stream]]) -> AsyncIterator[AgentGuest]:
    """Attach to the agent at the other end of the stream *open_stream* returns; the stream is closed at the end.

    Entering waits until the agent answers, for ever if it never does: bound it with ``fail_after``. Bytes of an earlier
    conversation on the stream are skipped. Processes of an earlier one go on running: see `AgentGuest.processes`.

    Raises:
        DependencyDown: the stream ended before the agent answered.
        BackendError: the agent has no root file system, or does not speak this protocol.
    """
    stream = await open_stream()
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                connection = Connection(stream)
                nursery.start_soon(connection.read)
                nursery.start_soon(connection.write)
                hello = await connection.sync()
                if hello.problem:
                    raise BackendError(
                        f"The guest started but has no root file system: {hello.problem}. Nothing runs in it. Check "
                        "the image's root file system and kernel, and the kernel command line's root=."
                    )
                yield AgentGuest(connection, hello)
            except Exception as error:  # raised again below, where no nursery wraps it
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        await trio.aclose_forcefully(stream)
    if failure is not None:
        raise failure


class AgentGuest:
    """Fulfils `noid.core.backends.Guest`. Made by `connect`; valid inside it.

    Attributes:
        hello: What the agent said of itself and its machine when the conversation began.
        features: What it can do. One that came with an old checkpoint cannot do all.
    """

    def __init__(self, connection: Connection, hello: Hello) -> None:
        self.hello = hello
        self.features = _FEATURES | ({"ports"} if tunnel.BUILTIN in hello.builtins else set())
        self._connection = connection

    async def start(self, request: ExecRequest) -> GuestProcess:
        """Start a process and attach to it. Cancelled before it is known to run, it is killed.

        No user means root. ``request.timeout_secs`` is the caller's to enforce.

        Raises:
            InvalidRequest: no such user, working directory not enterable, something that cannot be passed to a program.
            TooLarge: arguments and environment together exceed `frames.START_BYTES_MAX`.
            BackendError: the guest has no process, memory or file to spare, or broke the protocol.
            DependencyDown: the guest does not answer.
        """
        return await self._start(request, builtin=False)

    async def start_builtin(self, request: ExecRequest) -> GuestProcess:
        """Start a function of the agent itself, named by the first argument, as `start` does a program.

        A function the guest's agent does not have exits with 127. Raises what `start` raises.
        """
        return await self._start(request, builtin=True)

    async def _start(self, request: ExecRequest, *, builtin: bool) -> GuestProcess:
        if not request.argv or not request.argv[0]:
            raise InvalidRequest("command cannot be empty")
        if not LOG_BYTES_MIN <= request.log_bytes <= LOG_BYTES_MAX:
            raise InvalidRequest(
                f"log_bytes is {request.log_bytes}; it must be between {LOG_BYTES_MIN} and {LOG_BYTES_MAX}."
            )
        try:
            _check_length("user name", request.user or "", _USER_BYTES_MAX)
            _check_length("working directory", request.cwd or "", _CWD_BYTES_MAX)
            _check_length("label", request.label, LABEL_BYTES_MAX)
            body = frames.start_body(request, credit=OUTPUT_WINDOW_BYTES, builtin=builtin)
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"The command, its environment, directory or user contains {error.object[error.start]!a}, half a "
                "character, which no program can be given. Nothing was started."
            ) from error
        if len(body) > frames.START_BYTES_MAX:
            raise TooLarge(
                f"Arguments and environment have {len(body)} bytes; at most {frames.START_BYTES_MAX} are allowed. "
                "Nothing was started. Pass large data through stdin or a file."
            )
        return await self._connection.start(request, body)

    async def attach(self, process_id: int, offset: int) -> GuestProcess:
        """Attach to a process of this guest whose output is then received from *offset*.

        Where the guest has no longer kept all of that, a `Gap` is received first. Whoever was attached through this
        connection before receives nothing more. Cancelled, nobody is attached.

        Raises:
            NotFound: there is no such process.
            InvalidRequest: it has not written that much.
            Conflict: somebody else is attaching to it at this moment.
            DependencyDown: the guest does not answer.
        """
        return await self._connection.attach(process_id, offset)

    async def processes(self) -> list[GuestProcessInfo]:
        """Return the processes that were started through this agent and not released, oldest first.

        Of those that ended with nobody attached the agent keeps the latest 64. When ``hello.agent_starts`` is more than
        it was, the agent has died meanwhile, and what ran then is not in the list.

        Raises:
            DependencyDown: the guest does not answer.
            BackendError: the guest broke the protocol.
        """
        return sorted(await self._connection.list_processes(), key=lambda process: process.started_at_unix_ns)

    async def release(self, process: Process | int) -> None:
        """Forget a process: end its group (TERM, then KILL after a grace) if it still runs, and drop its output.

        An int is the id of one nobody needs to be attached to. Returns once it has ended, or after a bound if the guest
        does not say so. Cancelled, the guest ends it all the same. Releasing twice, or after the connection has failed,
        does nothing.
        """
        if not isinstance(process, GuestProcess | int):
            raise AssertionError("a process of another backend")  # noqa: TRY004  # a bug, not a value
        released = self._connection.begin_release(process, grace_secs=GRACE_SECS)
        if released is None:
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_after(_RELEASE_BOUND_SECS) as scope:
            await released.wait()
        if scope.cancelled_caught:
            _log.warning("the guest did not say within %g s that a released process ended", _RELEASE_BOUND_SECS)

    async def transfer(self, request: FileTransfer) -> GuestProcess:
        """Start the guest's end of a copy. What it says, and what it is told, `noid.core.backends.Guest` explains.

        Raises what `start` raises.
        """
        return await self.start_builtin(
            ExecRequest(argv=transfer_argv(request), user=request.user, stdin=request.incoming)
        )

    async def connect(self, request: ConnectRequest) -> Tunnel:
        """Make a TCP connection from inside the guest. It is the caller's to close. Cancelled, there is none.

        Raises:
            Unreachable: nothing takes connections there, or there is no way.
            Unsupported: the agent is of before it could do that.
        """
        if "ports" not in self.features:
            raise Unsupported(
                "vsock",
                "connect to a port of this guest, whose agent is of an older noid and came with its checkpoint",
                remedy="Boot it anew, which brings this one's agent: noid stop, then noid start.",
            )
        return await tunnel.connect(self, request)

    async def wake(self, identity: Identity) -> Receipt:
        """Make the guest its own: clock, randomness, names, network, then the image's own hooks.

        Answered before any later `start`; a `ping` is answered meanwhile.

        Raises:
            DependencyDown: the guest does not answer; what it has changed is unknown.
            BackendError: the guest cannot make sense of *identity*; nothing was changed.
        """
        answer = await self._connection.ask(Message.WAKE, Message.RECEIPT, frames.wake_body(identity))
        return parsed(frames.read_receipt, answer)

    @property
    def heard_at(self) -> float:
        """When the guest said something last, on trio's clock."""
        return self._connection.heard_at

    async def ping(self) -> float:
        """Return the round trip in seconds."""
        began = trio.current_time()
        await self._connection.ask(Message.PING, Message.PONG)
        return trio.current_time() - began

    async def power_off(self) -> None:
        """Ask the guest to sync its file systems and power off. Returns when it has acknowledged.

        The image's init shuts down in order, which may take long or for ever: bound the wait for the machine's end.
        """
        await self._connection.ask(Message.POWER, Message.POWERING, b"\x00")

    async def reboot(self) -> None:
        """Ask the guest to sync its file systems and start again. Returns when it has acknowledged; see `power_off`."""
        await self._connection.ask(Message.POWER, Message.POWERING, b"\x01")

    async def resize_console(self, size: TerminalSize) -> None:
        """Tell the guest how large the terminal at its serial console is. Where it has none this does nothing."""
        await trio.lowlevel.checkpoint()
        self._connection.check()
        self._connection.post(Message.RESIZE, _CONSOLE, frames.size_body(size))


def _check_length(what: str, value: str, limit: int) -> None:
    size = len(value.encode("utf-8", "surrogateescape"))
    if size > limit:
        raise InvalidRequest(f"The {what} has {size} bytes; at most {limit} are allowed.")
    if "\0" in value:
        raise InvalidRequest(f"The {what} contains a NUL byte.")
