"""One guest reached through a shell on its serial console: one command at a time, the others wait in a row."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from noid.core.backends import ConsolePort, GuestConnection, Process
from noid.core.model.connections import ConnectRequest
from noid.core.model.files import FileTransfer
from noid.core.model.guest_processes import GuestProcessInfo, OutputChunk, ProcessExit
from noid.core.model.processes import ExecRequest, TerminalSize
from noid.core.model.vms import Identity, Receipt
from noid.errors import Conflict, DependencyDown, NoidError, Unsupported
from noid_exec_serial import wake
from noid_exec_serial.line import find_shell, listening
from noid_exec_serial.process import SerialProcess, check
from noid_exec_serial.script import question

NAME = "serial"
WAITING_MAX = 64
GRACE_SECS = 2.0
_FIND_SECS = 15.0
_RELEASE_SECS = GRACE_SECS + 15.0
# Later, so that the shell can say that it has begun. systemd takes its time; any other init that does not listen
# within a few seconds never will.
_END_LATER = (
    "sync; (sleep 1; $0; [ -d /run/systemd/system ] || { sleep 5; sync; $0 -f; "
    "echo $1 >/proc/sysrq-trigger; }) >/dev/null 2>&1 </dev/null &"
)
_POWER_OFF = ("sh", "-c", _END_LATER, "poweroff", "o")
_REBOOT = ("sh", "-c", _END_LATER, "reboot", "b")


@asynccontextmanager
async def connect(console: ConsolePort) -> AsyncIterator[SerialGuest]:
    """Attach to the shell on *console*. Entering waits until one is at its prompt: bound it with ``fail_after``.

    Leaving kills the command that runs.

    Raises:
        BackendError: the guest asks for a login.
        DependencyDown: the machine has ended.
    """
    await find_shell(console)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield SerialGuest(console, nursery)
        except Exception as error:  # raised again below, where no nursery wraps it
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class SerialGuest:
    """Fulfils `noid.core.backends.Guest`, except for what `features` leaves out."""

    features = frozenset({"signals", "stdin", "stderr", "identity", "power"})

    def __init__(self, console: ConsolePort, nursery: trio.Nursery) -> None:
        self._console = console
        self._nursery = nursery
        self._turn = trio.Lock()  # first come, first served
        self._is_found = True
        self._heard_at = trio.current_time()
        self._running: SerialProcess | None = None
        self._numbers = itertools.count(1)
        self._processes: dict[int, SerialProcess] = {}

    @property
    def heard_at(self) -> float:
        """See `noid.core.backends.Guest.heard_at`."""
        return max(self._heard_at, self._running.heard_at if self._running is not None else self._heard_at)

    async def start(self, request: ExecRequest) -> SerialProcess:
        """Start a command; while another one runs, it waits for its turn and this returns at once.

        What is said below about a start is then said by `SerialProcess.receive`.

        Raises:
            Unsupported: a terminal is wanted.
            InvalidRequest: no such user, working directory not enterable, too large.
            Conflict: `WAITING_MAX` commands wait already.
            BackendError: the guest lacks a program this needs, or asks for a login.
            DependencyDown: no shell answers.
        """
        if request.tty is not None:
            raise Unsupported(NAME, "give a command a terminal")
        check(request)
        if len(self._processes) >= WAITING_MAX:
            raise Conflict(
                f"{WAITING_MAX} commands wait for the guest's serial console, which runs one at a time. Try again when "
                "some have ended, or use an image with noid's agent."
            )
        process = SerialProcess(next(self._numbers), request, self._console)
        waits = any(not other.is_over for other in self._processes.values())
        self._processes[process.id] = process
        self._nursery.start_soon(self._run, process, name=f"serial command {process.id}")
        try:
            if not waits:
                await process.begun.wait()
        except trio.Cancelled:
            process.scope.cancel()
            raise
        if process.failure is not None:
            raise process.failure
        return process

    async def _run(self, process: SerialProcess) -> None:
        """Wait for the turn of *process* and see it through. Its failures are its readers'."""
        failure: NoidError = DependencyDown("the connection to the guest's serial console was closed.")
        try:
            with process.scope:
                async with self._turn:
                    if not self._is_found:
                        await self._find_again()
                    self._is_found, self._running = False, process
                    try:
                        await process.converse()
                    finally:
                        self._heard_at = max(self._heard_at, process.heard_at)
                        self._is_found, self._running = process.shell_is_back, None
        except NoidError as error:
            failure = error
        finally:
            process.fail(failure)
            process.done.set()
            self._processes.pop(process.id, None)

    async def _find_again(self) -> None:
        with trio.move_on_after(_FIND_SECS):
            await find_shell(self._console)
            self._is_found = True
            return
        async with listening(self._console) as line:
            raise line.silence()

    async def attach(self, process_id: int, offset: int) -> Process:
        """Refuse: a command lives as long as its connection.

        Raises:
            Unsupported: always.
        """
        del process_id, offset
        await trio.lowlevel.checkpoint()
        raise Unsupported(NAME, "attach to a running command")

    async def processes(self) -> list[GuestProcessInfo]:
        """Refuse: nobody in the guest keeps a list.

        Raises:
            Unsupported: always.
        """
        await trio.lowlevel.checkpoint()
        raise Unsupported(NAME, "list the commands that run")

    async def release(self, process: Process | int) -> None:
        """Forget a process: end it (TERM, then KILL after a grace) if it still runs, and drop its output."""
        found = self._processes.get(process if isinstance(process, int) else process.id)
        if found is None:
            await trio.lowlevel.checkpoint()
            return
        found.forget()
        await found.end(GRACE_SECS)
        with trio.move_on_after(_RELEASE_SECS):
            await found.done.wait()
            return
        found.scope.cancel()

    async def transfer(self, request: FileTransfer) -> Process:
        """Refuse: the guest's end of a copy is a part of noid's agent.

        Raises:
            Unsupported: always.
        """
        await trio.lowlevel.checkpoint()
        raise Unsupported(NAME, f"copy {request.path!r}")

    async def connect(self, request: ConnectRequest) -> GuestConnection:
        """Refuse: the guest's end of a connection is a part of noid's agent.

        Raises:
            Unsupported: always.
        """
        await trio.lowlevel.checkpoint()
        raise Unsupported(NAME, f"connect to {request.target} of a guest")

    async def resize_console(self, size: TerminalSize) -> None:
        """Do nothing: commands have no terminal, and the console's is its viewers'."""
        del size
        await trio.lowlevel.checkpoint()

    async def wake(self, identity: Identity) -> Receipt:
        """Make the guest its own as far as a shell can. The receipt says what it cannot.

        Raises:
            DependencyDown: no shell answers.
        """
        process = await self.start(ExecRequest(argv=wake.ARGV, env=wake.environment(identity)))
        output = bytearray()
        try:
            while not isinstance(item := await process.receive(), ProcessExit):
                if isinstance(item, OutputChunk) and item.stream == 1 and len(output) < wake.OUTPUT_BYTES_MAX:
                    output += item.data
        finally:
            with trio.move_on_after(_RELEASE_SECS, shield=True):
                await self.release(process)
        return wake.receipt(bytes(output))

    async def ping(self) -> float:
        """Return the round trip in seconds.

        Raises:
            DependencyDown: no shell answers.
        """
        began = trio.current_time()
        if self._running is not None:
            await self._running.ping()
            return trio.current_time() - began
        async with self._turn:
            if not self._is_found:
                await self._find_again()
            async with listening(self._console) as line:
                await line.type(question(line.nonce))
                await line.expect("k")
        self._heard_at = trio.current_time()
        return trio.current_time() - began

    async def power_off(self) -> None:
        """Ask the guest to sync its file systems and power off. Returns when it has begun to."""
        await self._begin(_POWER_OFF)

    async def reboot(self) -> None:
        """Ask the guest to sync its file systems and reboot. Returns when it has begun to."""
        await self._begin(_REBOOT)

    async def _begin(self, argv: tuple[str, ...]) -> None:
        process = await self.start(ExecRequest(argv=argv))
        while not isinstance(await process.receive(), ProcessExit):
            pass
