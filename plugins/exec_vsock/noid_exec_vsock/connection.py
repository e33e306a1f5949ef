"""One conversation with a guest's agent: one reader task, one writer task, any number of callers.

The reader never waits for anybody, so no process' reader can hold up another. What it reads was written by a guest,
that is, by anybody: a message that cannot be meant ends the connection with `BackendError`, and what a guest can make
the host keep is bounded by the credit it was given.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from noid.core.model.guest_processes import GuestProcessInfo
from noid.core.model.processes import ExecRequest
from noid.errors import BackendError, Conflict, DependencyDown, InvalidRequest, NoidError, NotFound
from noid_exec_vsock import frames
from noid_exec_vsock.frames import FailedReason, Frame, FrameDecoder, Hello, Message, ProtocolError
from noid_exec_vsock.process import OUTPUT_WINDOW_BYTES, GuestProcess

T = TypeVar("T")

_SYNC_EVERY_SECS = (0.05, 1.0)
_RECEIVE_BYTES = 65536
_SEND_BYTES = 65536
_QUEUED_BYTES_MAX = 256 * 1024
_WASTED_BYTES_MAX = 4 << 20  # an earlier conversation leaves an outbox, a ring and socket buffers: one at most
_QUESTIONS_MAX = 4096
_LISTED_MAX = 512  # what an agent's table holds
_PROCESS_IDS_FROM = 1 << 31  # below are questions


@dataclass(slots=True, kw_only=True)
class _Question:
    """Something that was asked. *answers* are the messages that may come back."""

    answers: frozenset[Message]
    answer: Frame | None = None
    failure: NoidError | None = None
    done: trio.Event = field(default_factory=trio.Event)
    attaching: GuestProcess | None = None


@dataclass(slots=True, kw_only=True)
class _Listing:
    """A LIST that is being answered."""

    number: int
    question: _Question
    found: list[GuestProcessInfo] = field(default_factory=list)


_ANSWERS = frozenset(
    (
        *(Message.STARTED, Message.FAILED, Message.ATTACHED, Message.LISTED),
        *(Message.PONG, Message.RECEIPT, Message.POWERING),
    )
)


class Connection:
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
        self._detaching: dict[int, trio.Event] = {}
        self._listing: _Listing | None = None
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
        self._check_debts()
        while True:
            number = self._last_id = self._last_id % (_PROCESS_IDS_FROM - 1) + 1
            if number not in self._questions:
                break
        question = self._questions[number] = _Question(answers=frozenset(answers))
        return number, question

    def _check_debts(self) -> None:
        if len(self._questions) + len(self._releasing) + len(self._detaching) >= _QUESTIONS_MAX:
            raise DependencyDown(
                f"The guest owes {_QUESTIONS_MAX} answers. It reads but does not answer: look at its console, or "
                "restore the VM from a checkpoint."
            )

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
            raise nonsense(error) from error

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
        self._check_debts()
        number = _PROCESS_IDS_FROM | secrets.randbits(31)
        while number in self.processes or number in self._questions or number in self._releasing:
            number = _PROCESS_IDS_FROM | secrets.randbits(31)
        question = self._questions[number] = _Question(answers=frozenset((Message.STARTED, Message.FAILED)))
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
            reason, words = parsed(frames.read_failed, answer)
            if reason == FailedReason.INVALID:
                raise InvalidRequest(f"The guest cannot start {request.argv[0]!r} like this: {words}.")
            raise BackendError(f"The guest could not start {request.argv[0]!r}: {words}. Nothing was started.")
        return process

    async def attach(self, number: int, offset: int) -> GuestProcess:
        """Attach to a process from *offset* of its log; who was attached here before hears no more of it."""
        while (detaching := self._detaching.get(number)) is not None:
            await detaching.wait()
        await self.room()
        self._check_debts()
        if number in self._questions:
            raise Conflict(f"Process {number:08x} is being started or attached to by somebody else. Try again.")
        if (before := self.processes.get(number)) is not None:
            before.forget()
        process = GuestProcess(number, self, stdin=False, offset=offset)
        answers = frozenset((Message.ATTACHED, Message.FAILED))
        question = self._questions[number] = _Question(answers=answers, attaching=process)
        # Behind all input that whoever was attached before has sent: the guest counts credit from here on.
        self.post_bulk(Message.ATTACH, number, frames.attach_body(offset, OUTPUT_WINDOW_BYTES))
        try:
            await question.done.wait()
        except trio.Cancelled:
            self._begin_detach(process)
            raise
        answer = self._answered(question)
        if answer.type == Message.FAILED:
            reason, words = parsed(frames.read_failed, answer)
            if reason == FailedReason.NO_PROCESS:
                raise NotFound(f"There is no process {number:08x} in the guest: it was released, or ended long ago.")
            raise InvalidRequest(f"The guest cannot give process {number:08x} from {offset} on: {words}.")
        return process

    def _begin_detach(self, process: GuestProcess) -> None:
        process.forget()
        if self.failure is None:
            self._detaching[process.id] = trio.Event()
            self.post_bulk(Message.DETACH, process.id)

    async def list_processes(self) -> list[GuestProcessInfo]:
        """Ask for all processes. Cancelled, the answer is ignored when it comes."""
        while self._listing is not None:  # the guest answers one at a time
            await self._listing.question.done.wait()
        await self.room()
        number, question = self._new_question(Message.LISTED)
        listing = self._listing = _Listing(number=number, question=question)
        self.post(Message.LIST, number)
        await question.done.wait()
        self._answered(question)
        return listing.found

    def begin_release(self, process: GuestProcess | int, *, grace_secs: float) -> trio.Event | None:
        """Ask the guest to end and forget a process; return what tells when it has, or None where nothing is awaited.

        Nothing is for what has ended: the guest forgets it at once.
        """
        number = process if isinstance(process, int) else process.id
        held = self.processes.get(number) if isinstance(process, int) else process
        if held is not None:
            held.forget()
        if self.failure is not None or (held is not None and held.released):
            return self._releasing.get(number) if self.failure is None else None
        if held is not None:
            held.released = True
        if number not in self._releasing:
            self._releasing[number] = trio.Event()
            self.post(Message.RELEASE, number, frames.grace_body(grace_secs))
        return None if held is not None and held.ended else self._releasing[number]

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
            try:
                for frame in self._decoder.feed(data):
                    self._hear(frame)
                    self.heard_at = trio.current_time()  # noise is no sign of life
                if self._decoder.wasted_bytes > _WASTED_BYTES_MAX:
                    raise ProtocolError(f"{self._decoder.wasted_bytes} bytes without a message")
            except ProtocolError as error:
                self._fail(nonsense(error), error)

    def _hear(self, frame: Frame) -> None:
        number = frame.id
        process = self.processes.get(number)
        if frame.type == Message.HELLO:
            self._hellos += 1
            if self._hellos > self._syncs:
                raise ProtocolError("HELLO nobody asked for")
            if self._hellos == 1:
                self._on_answer(frame)
        elif frame.type in _ANSWERS:
            self._on_answer(frame)
        elif frame.type == Message.PROCESS:
            self._on_listed(frame)
        elif frame.type in (Message.RELEASED, Message.DETACHED):
            self._on_parted(frame)
        elif frame.type == Message.ERROR:
            self._on_error(frame, process)
        elif process is None:
            raise ProtocolError(f"message {frame.type:#x} about process {number:08x}, which there is not")
        else:
            self._on_process(frame, process)

    def _on_answer(self, frame: Frame) -> None:
        question = self._questions.get(frame.id)  # it stays until the answer is believed: a lie must reach who waits
        if question is None or frame.type not in question.answers:
            raise ProtocolError(f"message {frame.type:#x} that answers nothing")
        if frame.type == Message.STARTED:
            if len(frame.body) != 4:
                raise ProtocolError(f"STARTED of {len(frame.body)} bytes")
            self.processes[frame.id].pid = int.from_bytes(frame.body, "little")
        elif frame.type == Message.ATTACHED and question.attaching is not None:
            question.attaching.on_attached(frames.read_attached(frame.body))
            self.processes[frame.id] = question.attaching
        elif frame.type == Message.FAILED:
            self.processes.pop(frame.id, None)
        elif frame.type == Message.LISTED and self._listing is not None:
            if frames.read_listed(frame.body) != len(self._listing.found):
                raise ProtocolError("LISTED counts other processes than were told of")
            self._listing = None
        del self._questions[frame.id]
        question.answer = frame
        question.done.set()

    def _on_listed(self, frame: Frame) -> None:
        if self._listing is None or frame.id != self._listing.number:
            raise ProtocolError("PROCESS where nobody asked for a list")
        if len(self._listing.found) >= _LISTED_MAX:
            raise ProtocolError(f"more than {_LISTED_MAX} processes")
        process = frames.read_process(frame.body)
        if process.id < _PROCESS_IDS_FROM:
            raise ProtocolError(f"PROCESS {process.id:08x}, an id that no process is given")
        if any(process.id == known.id for known in self._listing.found):
            raise ProtocolError(f"PROCESS {process.id:08x} twice in one list")
        self._listing.found.append(process)

    def _on_parted(self, frame: Frame) -> None:
        parting = self._releasing if frame.type == Message.RELEASED else self._detaching
        parted = parting.pop(frame.id, None)
        if parted is None:
            raise ProtocolError("RELEASED or DETACHED what was not to be")
        self.processes.pop(frame.id, None)
        self._questions.pop(frame.id, None)  # released before it was known to run: nobody waits for that answer
        parted.set()

    def _on_error(self, frame: Frame, process: GuestProcess | None) -> None:
        failure = BackendError(f"The guest agent refused a message: {frames.read_error(frame.body)}.")
        question = self._questions.pop(frame.id, None)
        if self._listing is not None and self._listing.question is question:
            self._listing = None
        if question is not None:
            question.failure = failure
            question.done.set()
        elif process is not None:
            process.on_refusal(failure)
        else:
            raise ProtocolError("ERROR about nothing that was said")

    def _on_process(self, frame: Frame, process: GuestProcess) -> None:
        question = self._questions.get(frame.id)
        if question is not None and question.attaching is None:
            raise ProtocolError(f"message {frame.type:#x} from a process that was not started yet")
        if frame.type in (Message.STDOUT, Message.STDERR):
            process.on_output(frame.type - Message.STDOUT + 1, *frames.read_output(frame.body))
        elif frame.type == Message.CREDIT:
            process.on_credit(*frames.read_credit(frame.body))
        elif frame.type == Message.STDIN_CLOSED:
            process.on_stdin_closed()
        elif frame.type == Message.EXIT:
            process.on_exit(frames.read_exit(frame.body))
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
        for parted in (*self._releasing.values(), *self._detaching.values()):
            parted.set()
        # Whoever waits for one of these to be over looks for it again when woken.
        self._releasing.clear()
        self._detaching.clear()
        self._listing = None
        self._control.clear()
        self._bulk.clear()
        self._queue_changed.unpark_all()


def parsed(read: Callable[[bytes], T], frame: Frame) -> T:
    """Return what *frame* says; nonsense becomes the error callers get."""
    try:
        return read(frame.body)
    except ProtocolError as error:
        raise nonsense(error) from error


def _gone() -> DependencyDown:
    return DependencyDown(
        "The guest's connection ended: its VM stopped, or somebody else took its place. What ran in the guest may "
        "still run. Look at the VM's state, then connect again."
    )


def nonsense(error: ProtocolError) -> BackendError:
    """Return what callers get when the guest breaks the protocol."""
    return BackendError(
        f"The guest agent broke the protocol: {error}. The connection was given up; the VM still runs. A guest that "
        "was tampered with does this: restore the VM from a checkpoint you trust."
    )
