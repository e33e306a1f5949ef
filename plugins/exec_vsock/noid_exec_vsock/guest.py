"""Speaks with one guest's agent over one byte stream: one reader task, one writer task, any number of callers.

The reader never waits for anybody, so no process' reader can hold up another. What it reads was written by a guest,
that is, by anybody: a message that cannot be meant ends the connection with `BackendError`, and what a guest can make
the host keep is bounded by the credit it was given.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from noid.core.backends import Process
from noid.core.model import ExecRequest, GuestProcessInfo, Identity, Receipt
from noid.errors import BackendError, DependencyDown, InvalidRequest, NoidError, TooLarge, Unsupported
from noid_exec_vsock import frames
from noid_exec_vsock.frames import FailedReason, Frame, FrameDecoder, Hello, Message, ProtocolError
from noid_exec_vsock.process import OUTPUT_WINDOW_BYTES, GuestProcess

T = TypeVar("T")
_log = logging.getLogger(__name__)

GRACE_SECS = 2.0
_RELEASE_BOUND_SECS = GRACE_SECS + 10.0
_SYNC_EVERY_SECS = (0.05, 1.0)
_RECEIVE_BYTES = 65536
_SEND_BYTES = 65536
_QUEUED_BYTES_MAX = 256 * 1024
_WASTED_BYTES_MAX = 16 << 20
_QUESTIONS_MAX = 4096
_USER_BYTES_MAX = 63
_CWD_BYTES_MAX = 4095


@asynccontextmanager
async def connect(open_stream: Callable[[], Awaitable[trio.abc.Stream]]) -> AsyncIterator[AgentGuest]:
    """Attach to the agent at the other end of the stream *open_stream* returns; the stream is closed at the end.

    Entering waits until the agent answers, for ever if it never does: bound it with ``fail_after``. Bytes of an earlier
    conversation on the stream are skipped. Processes of an earlier conversation go on running unheard.

    Raises:
        DependencyDown: the stream ended before the agent answered.
        BackendError: the agent has no root file system, or does not speak this protocol.
    """
    stream = await open_stream()
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                connection = _Connection(stream)
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


@dataclass(slots=True, kw_only=True)
class _Question:
    """Something that was asked. *answers* are the messages that may come back."""

    answers: frozenset[Message]
    answer: Frame | None = None
    failure: NoidError | None = None
    done: trio.Event = field(default_factory=trio.Event)


class _Connection:
    """The conversation: queues in both directions and who waits for what."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.epoch = secrets.randbelow((1 << 32) - 1) + 1
        self.failure: NoidError | None = None
        self.heard_at = trio.current_time()
        self.processes: dict[int, GuestProcess] = {}
        self._stream = stream
        self._decoder = FrameDecoder(self.epoch)
        self._questions: dict[int, _Question] = {}
        self._releasing: dict[int, trio.Event] = {}
        self._last_id = 0
        self._syncs = self._hellos = 0
        self._control: deque[bytes] = deque()
        self._bulk: deque[bytes] = deque()
        self._queued_bytes = 0
        self._queue_changed = trio.lowlevel.ParkingLot()

    # --- sending --------------------------------------------------------------------------------------------------

    def post(self, kind: Message, number: int, body: bytes = b"") -> None:
        """Queue a control message. Never waits; does nothing once the connection has failed."""
        self._queue(self._control, Frame(type=kind, epoch=self.epoch, id=number, body=body))

    def post_bulk(self, kind: Message, number: int, body: bytes = b"") -> None:
        """Queue data, behind all control messages. Never waits; call `room` first."""
        self._queue(self._bulk, Frame(type=kind, epoch=self.epoch, id=number, body=body))

    def _queue(self, queue: deque[bytes], frame: Frame) -> None:
        if self.failure is None:
            encoded = frames.encode(frame)
            queue.append(encoded)
            self._queued_bytes += len(encoded)
            self._queue_changed.unpark_all()

    async def room(self) -> None:
        """Wait until little enough is queued.

        Raises:
            DependencyDown: the guest or its VM went away.
            BackendError: the guest broke the protocol.
        """
        while self.failure is None and self._queued_bytes > _QUEUED_BYTES_MAX:
            await self._queue_changed.park()
        self.check()

    def check(self) -> None:
        """Raise what ended the connection, if anything did."""
        if self.failure is not None:
            raise type(self.failure)(*self.failure.args) from self.failure  # its own traceback for each who waits

    async def write(self) -> None:
        """Send what is queued, control messages first, whole frames at a time. Ends with the connection."""
        while self.failure is None:
            batch, size = [], 0
            while (self._control or self._bulk) and size < _SEND_BYTES:
                batch.append((self._control or self._bulk).popleft())
                size += len(batch[-1])
            if not batch:
                await self._queue_changed.park()
                continue
            try:
                await self._stream.send_all(b"".join(batch))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._fail(_gone(), error)
            self._queued_bytes -= size
            self._queue_changed.unpark_all()

    # --- asking ---------------------------------------------------------------------------------------------------

    def _new_question(self, *answers: Message) -> tuple[int, _Question]:
        if len(self._questions) >= _QUESTIONS_MAX:
            raise DependencyDown(
                f"The guest owes {_QUESTIONS_MAX} answers. It reads but does not answer: look at its console, or "
                "restore the VM from a checkpoint."
            )
        while True:
            number = self._last_id = self._last_id % 0xFFFFFFFF + 1
            if not any(number in used for used in (self._questions, self.processes, self._releasing)):
                break
        question = self._questions[number] = _Question(answers=frozenset(answers))
        return number, question

    async def sync(self) -> Hello:
        """Begin the conversation and return who answered."""
        number, question = self._new_question(Message.HELLO)
        every_secs, most_secs = _SYNC_EVERY_SECS
        while not question.done.is_set():
            self._syncs += 1
            self.post(Message.SYNC, number)
            with trio.move_on_after(every_secs):
                await question.done.wait()
            every_secs = min(every_secs * 1.5, most_secs)
        try:
            return frames.read_hello(self._answered(question).body)
        except ProtocolError as error:
            raise _nonsense(error) from error

    async def ask(self, kind: Message, answer: Message, body: bytes = b"") -> Frame:
        """Send a message and wait for its answer. Cancelled, the answer is ignored when it comes."""
        await self.room()
        number, question = self._new_question(answer)
        self.post(kind, number, body)
        await question.done.wait()
        return self._answered(question)

    def _answered(self, question: _Question) -> Frame:
        if question.failure is not None:
            raise question.failure
        if question.answer is None:  # then the connection failed; an answer that came just before it did counts
            self.check()
            raise AssertionError("a question was called done without an answer")
        return question.answer

    async def start(self, request: ExecRequest, body: bytes) -> GuestProcess:
        """Start a process; cancelled before it is known to run, it is ended."""
        await self.room()
        number, question = self._new_question(Message.STARTED, Message.FAILED)
        process = self.processes[number] = GuestProcess(number, self, stdin=request.stdin)
        for frame in frames.start_frames(self.epoch, number, body):
            self._queue(self._control, frame)
        try:
            await question.done.wait()
        except trio.Cancelled:
            self.begin_release(process, grace_secs=0.0)
            raise
        answer = self._answered(question)
        if answer.type == Message.FAILED:
            reason, words = _parsed(frames.read_failed, answer)
            if reason == FailedReason.INVALID:
                raise InvalidRequest(f"The guest cannot start {request.argv[0]!r} like this: {words}.")
            raise BackendError(f"The guest could not start {request.argv[0]!r}: {words}. Nothing was started.")
        return process

    def begin_release(self, process: GuestProcess, *, grace_secs: float) -> trio.Event | None:
        """Ask the guest to end *process*; return what tells when it has, or None if there is nothing to end."""
        process.forget()
        if self.processes.get(process.id) is not process or self.failure is not None:
            return None
        if process.id not in self._releasing:
            self._releasing[process.id] = trio.Event()
            self.post(Message.RELEASE, process.id, round(grace_secs * 1000).to_bytes(4, "little"))
        return self._releasing[process.id]

    # --- hearing --------------------------------------------------------------------------------------------------

    async def read(self) -> None:
        """Hear everything the guest says. Ends with the connection, never raises what a guest did."""
        while self.failure is None:
            try:
                data = await self._stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._fail(_gone(), error)
                return
            if not data:
                self._fail(_gone())
                return
            self.heard_at = trio.current_time()
            try:
                for frame in self._decoder.feed(data):
                    self._hear(frame)
                if self._decoder.wasted_bytes > _WASTED_BYTES_MAX:
                    raise ProtocolError(f"{self._decoder.wasted_bytes} bytes without a message")
            except ProtocolError as error:
                self._fail(_nonsense(error), error)

    def _hear(self, frame: Frame) -> None:
        number = frame.id
        process = self.processes.get(number)
        if frame.type == Message.HELLO:
            self._hellos += 1
            if self._hellos > self._syncs:
                raise ProtocolError("HELLO nobody asked for")
            if self._hellos == 1:
                self._on_answer(frame)
        elif frame.type in (Message.STARTED, Message.FAILED, Message.PONG, Message.RECEIPT, Message.POWERING):
            self._on_answer(frame)
        elif frame.type == Message.RELEASED:
            released = self._releasing.pop(number, None)
            if released is None:
                raise ProtocolError("RELEASED for what was not released")
            self.processes.pop(number, None)
            released.set()
        elif frame.type == Message.ERROR:
            self._on_error(frame, process)
        elif process is None:
            raise ProtocolError(f"message {frame.type:#x} about process {number}, which there is not")
        else:
            self._on_process(frame, process)

    def _on_answer(self, frame: Frame) -> None:
        question = self._questions.pop(frame.id, None)
        if question is None or frame.type not in question.answers:
            raise ProtocolError(f"message {frame.type:#x} that answers nothing")
        if frame.type == Message.STARTED:
            if len(frame.body) != 4:
                raise ProtocolError(f"STARTED of {len(frame.body)} bytes")
            self.processes[frame.id].pid = int.from_bytes(frame.body, "little")
        elif frame.type == Message.FAILED:
            del self.processes[frame.id]
        question.answer = frame
        question.done.set()

    def _on_error(self, frame: Frame, process: GuestProcess | None) -> None:
        failure = BackendError(f"The guest agent refused a message: {frames.read_error(frame.body)}.")
        question = self._questions.pop(frame.id, None)
        if question is not None:
            question.failure = failure
            question.done.set()
        elif process is not None:
            process.fail(failure)
        else:
            raise ProtocolError("ERROR about nothing that was said")

    def _on_process(self, frame: Frame, process: GuestProcess) -> None:
        if frame.id in self._questions:
            raise ProtocolError(f"message {frame.type:#x} from a process that was not started yet")
        if frame.type in (Message.STDOUT, Message.STDERR):
            process.on_output(frame.type - Message.STDOUT + 1, *frames.read_output(frame.body))
        elif frame.type == Message.CREDIT:
            process.on_credit(*frames.read_credit(frame.body))
        elif frame.type == Message.STDIN_CLOSED:
            process.on_stdin_closed()
        elif frame.type == Message.EXIT:
            process.on_exit(*frames.read_exit(frame.body))
            del self.processes[frame.id]
        else:
            raise ProtocolError(f"message of unknown type {frame.type:#x}")

    def _fail(self, failure: NoidError, cause: Exception | None = None) -> None:
        """End the connection: everybody who waits, and everybody who will, gets *failure*."""
        if self.failure is not None:
            return
        failure.__cause__ = cause
        self.failure = failure
        for question in self._questions.values():
            question.done.set()
        for process in self.processes.values():
            process.fail(failure)
        for released in self._releasing.values():
            released.set()
        self._control.clear()
        self._bulk.clear()
        self._queue_changed.unpark_all()


class AgentGuest:
    """Fulfils `noid.core.backends.Guest`. Made by `connect`; valid inside it.

    Attributes:
        hello: What the agent said of itself and its machine when the conversation began.
    """

    features = frozenset({"signals", "stdin", "stderr", "identity", "power"})

    def __init__(self, connection: _Connection, hello: Hello) -> None:
        self.hello = hello
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
        try:
            _check_length("user name", request.user or "", _USER_BYTES_MAX)
            _check_length("working directory", request.cwd or "", _CWD_BYTES_MAX)
            body = frames.start_body(
                request, stdout_credit=OUTPUT_WINDOW_BYTES, stderr_credit=OUTPUT_WINDOW_BYTES, builtin=builtin
            )
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
        """Refuse: `features` says that this agent's processes end with their connection.

        Raises:
            Unsupported: always.
        """
        del process_id, offset
        raise Unsupported("vsock", "attach to a running process")

    async def processes(self) -> list[GuestProcessInfo]:
        """Refuse: see `attach`.

        Raises:
            Unsupported: always.
        """
        raise Unsupported("vsock", "list processes")

    async def release(self, process: Process | int) -> None:
        """Forget *process*: end its group (TERM, then KILL after a grace) if it still runs, and drop its output.

        Returns once it has ended, or after a bound if the guest does not say so. Cancelled, the guest ends it all the
        same. Releasing twice, or after the connection has failed, does nothing.
        """
        if not isinstance(process, GuestProcess):
            raise AssertionError("a process of another backend")  # noqa: TRY004  # a bug, not a value
        released = self._connection.begin_release(process, grace_secs=GRACE_SECS)
        if released is None:
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_after(_RELEASE_BOUND_SECS) as scope:
            await released.wait()
        if scope.cancelled_caught:
            _log.warning("the guest did not say within %g s that a released process ended", _RELEASE_BOUND_SECS)

    async def wake(self, identity: Identity) -> Receipt:
        """Make the guest its own: clock, randomness, names, network, then the image's own hooks.

        Answered before any later `start`; a `ping` is answered meanwhile.

        Raises:
            DependencyDown: the guest does not answer; what it has changed is unknown.
            BackendError: the guest cannot make sense of *identity*; nothing was changed.
        """
        answer = await self._connection.ask(Message.WAKE, Message.RECEIPT, frames.wake_body(identity))
        return _parsed(frames.read_receipt, answer)

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
        """Ask the guest to sync its file systems and reboot, as `power_off` does to power off."""
        await self._connection.ask(Message.POWER, Message.POWERING, b"\x01")


def _check_length(what: str, value: str, limit: int) -> None:
    size = len(value.encode("utf-8", "surrogateescape"))
    if size > limit:
        raise InvalidRequest(f"The {what} has {size} bytes; at most {limit} are allowed.")
    if "\0" in value:
        raise InvalidRequest(f"The {what} contains a NUL byte.")


def _parsed(read: Callable[[bytes], T], frame: Frame) -> T:
    try:
        return read(frame.body)
    except ProtocolError as error:
        raise _nonsense(error) from error


def _gone() -> DependencyDown:
    return DependencyDown(
        "The guest's connection ended: its VM stopped, or somebody else took its place. What ran in the guest may "
        "still run. Look at the VM's state, then connect again."
    )


def _nonsense(error: ProtocolError) -> BackendError:
    return BackendError(
        f"The guest agent broke the protocol: {error}. The connection was given up; the VM still runs. A guest that "
        "was tampered with does this: restore the VM from a checkpoint you trust."
    )
