"""What is said about one process between its client and the agent, over however many connections: no socket, no clock.

Nothing of output and input is lost or comes twice: output is numbered, and input is kept until the agent has said that
it has arrived. Both directions make progress independently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from noid.client.channels import Channels, Closed, Message
from noid.client.errors import ConnectionLost, ServerError
from noid.client.kept_input import KeptInput
from noid.core import wire
from noid.core.model.processes import Gap
from noid.errors import DependencyDown, LineageEnded

if TYPE_CHECKING:
    from noid.client.serial_output import SerialOutput


class ProcessProtocol:
    """What is known of one process.

    Attributes:
        process: Which one it is, once the agent has said so.
        offset: That of the next byte of output.
        result: How it ended, once it has.
        detached: Whether it has been left on purpose.
    """

    def __init__(
        self,
        on_output: Callable[[int, bytes], None],
        on_gap: Callable[[int], None],
        on_started: Callable[[], None] = lambda: None,
        *,
        is_typed: bool = False,
    ) -> None:
        """Make one that tells *on_output* each channel and data, and *on_gap* how many bytes are missing before.

        *on_started* is told each time the agent has said which process it is.

        *is_typed*: its input is a person's. Keys that were lost are seen to be, and typed again.
        """
        self.process: wire.Started | None = None
        self.offset = 0
        self.result: wire.ExecResult | None = None
        self.detached = False
        self._on_output, self._on_gap, self._on_started = on_output, on_gap, on_started
        self._is_typed = is_typed
        self._input = KeptInput()
        self._channels = Channels()  # until there is a connection; nothing is sent over it
        self._is_connected = False
        self._may_send = False
        self._end_sent = False
        self._size: tuple[int, int] | None = None
        self._serial: SerialOutput | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.result is not None or self.detached

    @property
    def can_resume(self) -> bool:
        """Whether another connection can go on where one was lost: not if input may have been lost with it."""
        return self.process is not None and (self._input.is_complete or self._is_typed)

    @property
    def wants_input(self) -> bool:
        """Whether there is room for more input now."""
        return self._may_send and self._channels.has_room and self._input.has_room and not self._input.ended

    @property
    def has_sent_all(self) -> bool:
        """Whether all input there was is on its way."""
        return self._may_send and self._input.sent == self._input.end and not self._channels.unsent

    @property
    def has_begun(self) -> bool:
        """Whether this connection may be given input."""
        return self._may_send

    def connect(self, channels: Channels, first: str | None = None) -> None:
        """Go on over a new connection, which begins with the request *first* if it starts the process."""
        self._channels, self._is_connected = channels, True
        # Where this goes on, the agent first says what of the input has arrived. A request is followed by it at once.
        self._may_send = first is not None or self.process is None
        self._end_sent = False
        if first is not None:
            channels.send_text(first)
        if self._size is not None:
            channels.send_size(*self._size)

    def expect_serial(self) -> None:
        """Take what comes for output that came over a serial line, as that of servers before 0.3.0."""
        from noid.client.serial_output import SerialOutput

        self._serial = SerialOutput()

    def give(self, data: bytes) -> None:
        """Give the process *data* as input; nothing is its end."""
        self._input.add(data)
        self.send()

    def send(self) -> None:
        """Send of the input what this connection has not been given, as far as there is room."""
        kept = self._input
        while self._may_send and self._channels.has_room and (data := kept.take(wire.CHUNK_BYTES)):
            self._channels.send(wire.STDIN, data)
        if self._may_send and kept.ended and not self._end_sent and kept.sent == kept.end:
            self._end_sent = True
            self._channels.send(wire.STDIN, b"")

    def resize(self, columns: int, rows: int) -> None:
        """Tell the process' terminal its size, now if there is a connection, and over every one to come."""
        self._size = columns, rows
        if self._is_connected:
            self._channels.send_size(columns, rows)

    def leave(self) -> None:
        """Ask that the process shall run on without this client, which stays until it is `detached`."""
        self.send()  # what was given before comes before
        self._channels.send_text(wire.DETACH)

    def cannot_send(self) -> None:
        """Sending has failed. The agent may have ended this before it read all input: what it said is to be read."""
        self._may_send = False

    def handle(self, message: Message) -> None:
        """Take what has come.

        Raises:
            ServerError: the agent refused, or could not run it.
            ConnectionLost: nobody knows how the process fares.
        """
        match message:
            case Closed(code=code, reason=reason):
                why = {1000: "", 1005: "", 1011: ": internal error", 1012: ": the agent is restarting"}.get(
                    code, f" ({code})"
                )
                raise Broken(f"it ended the exec without a result{': ' + reason if reason else why}")
            case str():
                self._handle_text(message)
            case channel, data if channel in (wire.STDOUT, wire.STDERR):
                self.offset += len(data)
                if self._serial is not None:
                    data = self._serial.feed(data)
                if data:
                    self._on_output(channel, data)

    def _handle_text(self, text: str) -> None:
        match wire.reply_from_json(text):
            case wire.ExecResult() as result:
                if self._serial is not None:
                    rest, result = self._serial.end(result)
                    if rest:
                        self._on_output(wire.STDOUT, rest)
                self.result = result
            case wire.Started() as started:
                if self._may_send:
                    self._input.begin(told=started.stdin is not None)
                elif not self._input.resume(started.stdin) and not self._is_typed:
                    raise Broken("it is attached again, but input between the connections is lost, or others gave some")
                self.process, self.offset = started, started.offset
                self._may_send = True
                self._on_started()
            case wire.InputArrived(end=end):
                self._input.arrived(end)
            case wire.Detached():
                self.detached = True
            case Gap(start=start, end=end):
                self.offset = end
                self._on_gap(end - start)
            case wire.ErrorResponse(error=error, code=DependencyDown.code | LineageEnded.code as code):
                # The agent stops, or it lost the guest, or the VM was put back: nobody knows how the command fares.
                raise ConnectionLost(error) from ServerError(error, status=0, code=code)
            case wire.ErrorResponse(error=error, code=code):
                raise ServerError(error, status=0, code=code)


class Broken(Exception):
    """This connection is of no use any more; the text says why."""
