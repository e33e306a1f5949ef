"""One command in a guest's shell: its upload, its output, its end, and what its callers do meanwhile.

`converse` is the only one who listens. Callers type (input, signals) whenever they like, each a whole line. A caller
who does not take output stops the guest's terminal (XOFF), and with it the command, once `OUTPUT_BYTES_MAX` wait here.
"""

from __future__ import annotations

import logging
import math
from collections import deque

import trio

from noid.core.backends import ConsolePort
from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.processes import ExecRequest, Gap, TerminalSize
from noid.errors import BackendError, Conflict, DependencyDown, InvalidRequest, NoidError
from noid_exec_serial import script
from noid_exec_serial.line import ANSWER_SECS, Line, listening
from noid_exec_serial.output import Assembler, Lost
from noid_exec_serial.records import Record

_log = logging.getLogger(__name__)

OUTPUT_BYTES_MAX = 256 * 1024
#: A command that has ended, and whose end marks have not come, is over after this long without a sign.
LINGER_SECS = 10.0
_QUIET_SECS = 20.0
_LOOK_SECS = 0.5
_LINES_ON_THE_WAY_MAX = 2
_CLEAN_UP_SECS = 5.0
_SIGNAL_MAX = 64
_TERM, _KILL = 15, 9


class SerialProcess:
    """Fulfils `noid.core.backends.Process`. It waits for its turn first: a shell runs one command at a time.

    Attributes:
        id: Its number on this connection.
        pid: Its process id in the guest; 0 until it runs.
        begun: Set once it runs or has failed to.
        done: Set once nothing of it is left.
        scope: What ends its turn, or its wait for one.
        heard_at: When the guest last said something of it, in trio's time.
        failure: Why its end will never be known, or why it was not started.
        shell_is_back: Whether the shell was seen to be at its prompt again.
    """

    def __init__(self, number: int, request: ExecRequest, console: ConsolePort) -> None:
        self.id = number
        self.pid = 0
        self.stdin_taken = 0
        self.begun = trio.Event()
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self._request = request
        self._console = console
        self._nonce = ""
        self._group = ""
        self._encoders: list[str] = []
        self._streams: dict[int, Assembler] = {}
        self._queue: deque[OutputChunk | Gap] = deque()
        self._queued_bytes = 0
        self._offset = 0
        self._stopped = False
        self.heard_at = -math.inf
        self._answers = 0
        self._kill_at = math.inf
        self._lines_on_the_way = 0
        self._stdin_open = request.stdin
        self._exit: ProcessExit | None = None
        self.failure: NoidError | None = None
        self.shell_is_back = False
        self._released = False
        self._changed = trio.lowlevel.ParkingLot()

    # --- what callers do ---------------------------------------------------------------------------------------------

    async def receive(self) -> OutputChunk | Gap | ProcessExit:
        """Return the next output, or how the process ended; after the end, `ProcessExit` again and again.

        A `Gap` stands for output that something else on the console damaged; its length may be a bound.

        Raises:
            InvalidRequest: it waited for its turn, and then could not be started like this.
            DependencyDown: the shell or the VM went away; the process' fate is unknown.
            Conflict: the process was released.
        """
        await trio.lowlevel.checkpoint()
        while not self._queue:
            if self._released:
                raise Conflict(f"Process {self.id} was released; nothing more will be heard of it.")
            if self.failure is not None:
                raise type(self.failure)(*self.failure.args) from self.failure
            if self._exit is not None:
                return self._exit
            await self._changed.park()
        if self._stopped and self._queued_bytes <= OUTPUT_BYTES_MAX // 2:
            await self._go_on()
        item = self._queue.popleft()
        if isinstance(item, OutputChunk):
            self._queued_bytes -= len(item.data)
        return item

    async def send_stdin(self, data: bytes) -> None:
        """Write to the process' stdin; waits while the process does not read. Ignored once it has closed stdin.

        Raises:
            InvalidRequest: the process was started without stdin.
            DependencyDown: the guest or its VM went away.
        """
        if not self._request.stdin:
            raise InvalidRequest("The process was started without stdin. Start it with stdin=True to write to it.")
        await trio.lowlevel.checkpoint()
        for line in script.stdin_lines(data):
            while self._stdin_open and not self.is_over and (not self.pid or self._is_window_full):
                await self._changed.park()
            if not self._stdin_open or self.is_over:
                return
            self._lines_on_the_way += 1
            await self._console.write(line)

    async def close_stdin(self) -> None:
        """Let the process see the end of its input. Closing twice does nothing."""
        await self._has_begun()
        if self._stdin_open and not self.is_over:
            self._stdin_open = False
            await self._console.write(b"z\n")

    async def signal(self, signo: int) -> None:
        """Send *signo* to the process' group, or where the guest has no ``setsid`` to the process alone.

        Signalling an ended process does nothing; one that waits for its turn is signalled once it runs.

        Raises:
            InvalidRequest: there is no such signal.
        """
        if not 1 <= signo <= _SIGNAL_MAX:
            raise InvalidRequest(f"There is no signal {signo}. Use 1 to {_SIGNAL_MAX}.")
        await self._has_begun()
        if self._exit is None and not self.is_over:
            await self._console.write(f"s{signo} {self._target}\n".encode("ascii"))

    async def resize(self, size: TerminalSize) -> None:
        """Do nothing: it has no terminal."""
        del size
        await trio.lowlevel.checkpoint()

    async def end(self, grace_secs: float) -> None:
        """Ask the process' group to end: TERM now, KILL after the grace. Returns once TERM is sent.

        One that waits for its turn is dropped.
        """
        if not self.pid and not self.is_over:
            self._fail(Conflict("the command was ended before its turn on the serial console came; it never ran."))
            self.scope.cancel()
            return
        self._kill_at = trio.current_time() + grace_secs
        if self._stopped:
            await self._go_on()
        await self.signal(_TERM)

    def forget(self) -> None:
        """Drop the output; nobody wants it."""
        self._released = True
        self._queue.clear()
        self._queued_bytes = 0
        self._changed.unpark_all()

    async def ping(self) -> None:
        """Return when the guest has answered; when the process has ended too."""
        await self._has_begun()
        heard = self._answers
        if not self.is_over:
            await self._console.write(b"#h\n")
        while not self.is_over and self._answers == heard:
            await self._changed.park()

    async def _go_on(self) -> None:
        self._stopped = False
        await self._console.write(script.GO_ON)

    async def _has_begun(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self.pid and not self.is_over:
            await self._changed.park()

    @property
    def is_over(self) -> bool:
        """Whether its end is known, or why it will never be."""
        return self._exit is not None or self.failure is not None

    @property
    def _is_window_full(self) -> bool:
        return self._lines_on_the_way >= _LINES_ON_THE_WAY_MAX

    @property
    def _target(self) -> str:
        return f"-{self.pid}" if self._group == "group" else str(self.pid)

    # --- what the connection does, in its turn -----------------------------------------------------------------------

    async def converse(self) -> None:
        """Run the command from beginning to end, with the console to itself. The shell is at its prompt afterwards.

        Cancelled, the command is killed.

        Raises:
            InvalidRequest, BackendError: it cannot be started like this; the shell is at its prompt.
            DependencyDown: the shell does not answer any more.
        """
        async with listening(self._console) as line:
            self._nonce = line.nonce
            started = False
            try:
                await self._upload(line)
                started = True
                await self._follow(line)
            except trio.Cancelled:
                with trio.move_on_after(_CLEAN_UP_SECS, shield=True):
                    try:
                        await line.type(script.GO_ON + (self._last_words() if started else script.ABORT))
                        await line.expect("q")
                    except NoidError as error:  # who comes next looks for the shell anew
                        _log.info("a cancelled command on a serial console was not seen to end: %s", error)
                raise

    async def _upload(self, line: Line) -> None:
        request = self._request
        await line.type(script.first_line(line.nonce))
        if (await line.expect("r", "n")).kind == "n":
            raise BackendError(
                "the guest's root has no working stty, so its console would show whatever is typed there. Nothing was "
                "run. Install coreutils or busybox in it, or use an image with noid's agent."
            )
        probe = f"#e{line.nonce}".encode("ascii")
        await line.type(probe + b"\n")
        await line.expect("k")
        if line.saw(probe):
            await line.type(script.ABORT)
            await line.expect("q")
            raise BackendError(
                "the guest's console echoes what is typed although it was told not to, so it would show secrets. "
                "Nothing was run. Use an image with noid's agent."
            )
        lines = script.program(
            [_encoded(word) for word in request.argv],
            [_encoded(f"{key}={value}") for key, value in request.env.items()],
            user=_encoded(request.user or ""),
            cwd=_encoded(request.cwd or ""),
            stdin=request.stdin,
        )
        for batch in script.batches(lines[:-1]):
            await line.type(batch + b"#u\n")
            await line.expect("k")
        await line.type(lines[-1] + b"\n")
        answer = await line.expect("o", "f", "q")
        if answer.kind == "o":
            encoding, self._group = answer.fields
            end_mark = script.end_mark(line.nonce)
            self._streams = {stream: Assembler(stream, encoding, end_mark) for stream in (1, 2)}
            return
        if answer.kind == "f":
            await line.expect("q")
            self.shell_is_back = True
            raise self._refusal(answer.fields[0])
        self.shell_is_back = True
        raise BackendError(
            "the command did not reach the guest as it was typed: somebody else typed on the serial console at the "
            "same time. It was not run. Try again."
        )

    def _refusal(self, why: str) -> NoidError:
        word, _, detail = why.partition(" ")
        request = self._request
        if word == "user":
            return InvalidRequest(f"The guest cannot start {request.argv[0]!r} like this: no user {request.user!r}.")
        if word == "cwd":
            return InvalidRequest(
                f"The guest cannot start {request.argv[0]!r} like this: cannot enter the directory {request.cwd!r}."
            )
        if word == "root":
            return InvalidRequest(
                f"The shell on the guest's serial console is user {detail}, so it cannot run {request.argv[0]!r} as "
                f"{request.user!r}. Run it as that user, or let root log in there."
            )
        return BackendError(
            f"the guest's root has no {detail!r}, which running commands over its serial console needs. Nothing was "
            "run. Install coreutils or busybox in it, or use an image with noid's agent."
        )

    async def _follow(self, line: Line) -> None:
        """Take in output until the command and its encoders have ended."""
        asked_at: float | None = None
        heard_at = trio.current_time()
        status: int | None = None
        while status is None or not all(stream.complete for stream in self._streams.values()):
            if self._queued_bytes > OUTPUT_BYTES_MAX and not self._stopped:
                self._stopped = True
                await line.type(script.STOP_OUTPUT)
            if trio.current_time() >= self._kill_at:
                self._kill_at = math.inf
                await line.type(f"s{_KILL} {self._target}\n".encode("ascii"))
            record: Record | None = None
            with trio.move_on_after(_LOOK_SECS if status is None else LINGER_SECS):
                record = await line.record()
            if record is not None:
                asked_at = None
                heard_at = self.heard_at = trio.current_time()
                if (ended := await self._take(line, record)) is not None:
                    status = ended
            elif self._stopped:
                heard_at = trio.current_time()
            elif status is not None:  # an end mark was lost on the way; what else is missing was said to be
                break
            elif asked_at is None and trio.current_time() > heard_at + _QUIET_SECS:
                asked_at = trio.current_time()
                await line.type(b"#a\n")
            elif asked_at is not None and trio.current_time() > asked_at + ANSWER_SECS:
                raise line.silence()
        self._exit = ProcessExit(code=status)
        self._changed.unpark_all()
        await line.type(b"q\n" if all(stream.ended for stream in self._streams.values()) else self._last_words())
        await line.expect("q")
        self.shell_is_back = True

    def _last_words(self) -> bytes:
        """Return what ends the encoders, and the command if it still runs."""
        targets = " ".join(([self._target] if self.pid and self._exit is None else []) + self._encoders)
        kill = f"s{_KILL} {targets}\n".encode("ascii") if targets else b""
        return kill + (b"q\n" if self._exit is not None else script.ABORT)

    async def _take(self, line: Line, record: Record) -> int | None:
        """Act on *record*; return the status if it says that the command has ended."""
        if record.kind in "dbz":
            for found in self._streams[int(record.fields[0])].take(record):
                self._append(Gap(start=self._offset, end=self._offset + found.size) if isinstance(found, Lost)
                             else OutputChunk(stream=found.stream, data=found.data, offset=self._offset))  # fmt: skip
        elif record.kind == "t" and len(self._encoders) < len(self._streams) and record.fields[0] not in self._encoders:
            self._encoders.append(record.fields[0])
        elif record.kind == "p" and not self.pid:
            self.pid = int(record.fields[0])
            # Said back, so that whoever finds this reader without us knows what to end.
            await line.type(f"P{' '.join([self._target, *self._encoders])}\n".encode("ascii"))
            self.begun.set()
            self._changed.unpark_all()
        elif record.kind == "a":
            self._lines_on_the_way = max(0, self._lines_on_the_way - 1)
            self._changed.unpark_all()
        elif record.kind == "c":
            self._stdin_open = False
            self._changed.unpark_all()
        elif record.kind == "x":
            return int(record.fields[0])
        elif record.kind == "k":
            self._answers += 1
            self._changed.unpark_all()
        elif record.kind == "q":
            self.shell_is_back = True
            raise DependencyDown(
                "the shell on the guest's serial console ended the command without saying how; its exit code is "
                "unknown. Somebody else may have typed there."
            )
        return None

    def _append(self, item: OutputChunk | Gap) -> None:
        self._offset = item.end
        if not self._released:
            self._queue.append(item)
            if isinstance(item, OutputChunk):
                self._queued_bytes += len(item.data)
            self._changed.unpark_all()

    def _fail(self, failure: NoidError) -> None:
        self.failure = self.failure or failure
        self.begun.set()
        self._changed.unpark_all()

    def fail(self, failure: NoidError) -> None:
        """Let everybody who waits, now or later, have *failure* once the output is used up. A known end stays."""
        if self._exit is None:
            self._fail(failure)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def check(request: ExecRequest) -> None:
    """Refuse what this way into a guest cannot do, before anything is typed.

    Raises:
        InvalidRequest: the request is larger than a serial line carries in reasonable time, or holds a NUL.
    """
    words = [*request.argv, *(f"{key}={value}" for key, value in request.env.items()), request.cwd or ""]
    size = sum(len(_encoded(word)) for word in words)
    if size > script.REQUEST_BYTES_MAX:
        raise InvalidRequest(
            f"The command and its environment are {size} bytes; over a serial console at most "
            f"{script.REQUEST_BYTES_MAX} are possible. Write what is long to a file through the command's input."
        )
    if any("\0" in word for word in [*words, request.user or ""]):
        raise InvalidRequest("The command, its environment, user or directory contains a NUL byte.")
