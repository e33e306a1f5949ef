"""Runs one command in a guest in front of a terminal or a pipe: output as it comes, input as it is typed, one result.

One thread, one ``select``, no event loop: a command that runs for a millisecond shall not wait 100 ms for a concurrency
framework to be imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from noid.client.link import Link
from noid.client.process_line import ProcessLine
from noid.client.process_protocol import ProcessProtocol
from noid.client.settings import Endpoint
from noid.client.terminal import DetachKeys, Terminal
from noid.client.waiting import Blocking, finished
from noid.core import wire
from noid.core.model.processes import ExecRequest


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What is in front of one process.

    Attributes:
        on_output: Called with channel (1 stdout, 2 stderr) and bytes as they arrive.
        on_gap: Called with how many bytes of output are missing where it is called.
        on_started: Called when the agent has said which process it is, also after a connection was made again.
        stdin_fd: What is forwarded until its end.
        detach_keys: What of them has been typed.
        protocol: What is known of the process.
    """

    on_output: Callable[[int, bytes], None]
    on_gap: Callable[[int], None] = lambda _: None
    on_started: Callable[[], None] = lambda: None
    stdin_fd: int | None = None
    terminal: Terminal | None = None
    detach_keys: DetachKeys = field(init=False)
    protocol: ProcessProtocol = field(init=False)

    def __post_init__(self) -> None:
        self.detach_keys = DetachKeys(self.terminal.keys if self.terminal else b"")
        self.protocol = ProcessProtocol(
            self.on_output, self.on_gap, self.on_started, is_typed=self.terminal is not None
        )
        if self.terminal is not None:
            self.protocol.resize(*self.terminal.size())

    @property
    def process(self) -> wire.Started | None:
        """Which process it is, once the agent has said so."""
        return self.protocol.process


def run(endpoint: Endpoint, name: str, request: ExecRequest, conversation: Conversation) -> wire.ExecResult | None:
    """Run *request* on the VM *name*. None when the user has detached from it.

    ``conversation.stdin_fd`` is forwarded until its end if the request says ``stdin``. A connection that is lost is
    made again for a while, and nothing of input and output is lost or comes twice. Whatever else ends this
    early, an exception from *on_output* or KeyboardInterrupt included, closes the connection, and the agent then ends
    the process.

    Raises:
        ConnectionFailed: nothing was run.
        ServerError: the agent refused, or could not run it.
        ConnectionLost: the connection to the agent, or the agent's to the guest, ended before the result.
    """
    if not request.stdin and request.tty is None:
        conversation.stdin_fd = None
    line = ProcessLine(Link(endpoint, Blocking()), name, conversation.protocol)
    try:
        finished(line.run(request))
        return _converse(line, conversation)
    finally:
        line.close()


def attach(
    endpoint: Endpoint, name: str, process: str, conversation: Conversation, *, from_start: bool
) -> wire.ExecResult | None:
    """Attach to a process of the VM *name*, as one of its readers. None when the user has detached from it.

    Raises:
        ConnectionFailed, ServerError, ConnectionLost: as `run`; the process is not affected.
    """
    line = ProcessLine(Link(endpoint, Blocking()), name, conversation.protocol)
    try:
        finished(line.attach(process, from_start=from_start, readonly=conversation.stdin_fd is None))
        return _converse(line, conversation)
    finally:
        line.close()


def _converse(line: ProcessLine, conversation: Conversation) -> wire.ExecResult | None:
    protocol, terminal = conversation.protocol, conversation.terminal
    wakeup_fd = None if terminal is None else terminal.wakeup_fd
    while not protocol.is_over:
        readers = [conversation.stdin_fd] if conversation.stdin_fd is not None and protocol.wants_input else []
        if wakeup_fd is not None:
            readers.append(wakeup_fd)
        ready = finished(line.step(readers))
        if terminal is not None and wakeup_fd is not None and wakeup_fd in ready:
            os.read(wakeup_fd, 4096)
            protocol.resize(*terminal.size())
        if conversation.stdin_fd in ready and not protocol.is_over:
            _forward_input(line, conversation)
    return protocol.result


def _forward_input(line: ProcessLine, conversation: Conversation) -> None:
    assert conversation.stdin_fd is not None  # noqa: S101  # the caller saw it among what can be read
    try:
        data = os.read(conversation.stdin_fd, wire.CHUNK_BYTES)
    except BlockingIOError:
        return
    except OSError:
        data = b""  # a terminal that went away: the same to the guest as the end of the input
    if not data:
        conversation.protocol.give(b"")
        conversation.stdin_fd = None
        return
    typed, leaving = conversation.detach_keys.feed(data)
    if typed:
        conversation.protocol.give(typed)
    if leaving:
        conversation.stdin_fd = None
        line.leave()
