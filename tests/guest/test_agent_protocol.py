"""PROTOCOL.md against the real agent, frame by frame."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from noid_exec_vsock import frames
from noid_exec_vsock.frames import Frame, FrameDecoder, Message, encode

from noid.core.model.processes import ExecRequest

from .conftest import EPOCH, NativeAgent, Wire

HALF = encode(Frame(type=Message.PING, epoch=EPOCH, id=1, body=b"half of this" + bytes(100)))


def start(wire: Wire, number: int, *argv: str, credit: int = 1 << 20, stdin: bool = False) -> None:
    request = ExecRequest(argv=argv, stdin=stdin)
    body = frames.start_body(request, credit=credit)
    for frame in frames.start_frames(wire.epoch, number, body):
        wire.send(frame.type, number, frame.body)


def output(wire: Wire, number: int) -> bytes:
    """Everything up to EXIT."""
    said = b""
    while (frame := wire.hear()).type != Message.EXIT:
        if frame.type == Message.STDOUT:
            assert frame.id == number
            offset, data = frames.read_output(frame.body)
            assert offset == len(said)
            said += data
    return said


def test_the_conversation_begins_with_hello(wire: Wire, agent: NativeAgent) -> None:
    hello = frames.read_hello(wire.sync().body)
    assert hello.pid == agent.pid
    assert hello.problem == ""
    assert hello.kernel_release == os.uname().release
    assert hello.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_nothing_is_answered_before_sync_or_in_another_epoch(wire: Wire) -> None:
    wire.send(Message.PING, 1)
    wire.sync()
    wire.send(Message.PING, 2, epoch=wire.epoch + 1)
    wire.send(Message.SYNC, 3, epoch=0)
    assert wire.ping(4).body == b"still there?"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.binary(max_size=64), cut=st.integers(0, 200), garbage=st.binary(max_size=60))
@example(data=b"", cut=len(HALF) - 2, garbage=HALF[-2:-1])  # the next flag completes it: then it is no half
@example(data=b"", cut=len(HALF) - 2, garbage=HALF[-2:])
@example(data=b"", cut=len(HALF) - 2, garbage=b"\x7d")
def test_the_agent_hears_after_half_frames_and_garbage_what_the_host_would(
    wire: Wire, data: bytes, cut: int, garbage: bytes
) -> None:
    wire.sync()
    sent = HALF[:cut] + garbage + encode(Frame(type=Message.PING, epoch=wire.epoch, id=2, body=data))
    wire.socket.sendall(sent)
    pings = [frame for frame in FrameDecoder(wire.epoch).feed(sent) if frame.type == Message.PING]
    assert (pings[-1].id, pings[-1].body) == (2, data)
    for ping in pings:
        assert wire.expect(Message.PONG, ping.id).body == ping.body[:64]


def test_half_a_frame_of_the_host_before_cannot_join_with_one_of_the_next(another_wire: Callable[[], Wire]) -> None:
    first = another_wire()
    first.sync()
    first.socket.sendall(b"\x7e\x02\x02")
    first.ping  # noqa: B018  # nothing is heard: the frame is half
    second = another_wire()
    assert second.sync().epoch == second.epoch
    second.ping()


def test_output_stops_where_credit_ends_and_goes_on_with_more(wire: Wire) -> None:
    wire.sync()
    start(wire, 7, "sh", "-c", "seq 100000", credit=1000)
    wire.expect(Message.STARTED, 7)
    heard = 0
    while heard < 1000:
        heard += len(frames.read_output(wire.expect(Message.STDOUT, 7).body)[1])
    assert heard == 1000
    wire.ping()  # and nothing came before its answer: the stream has stopped
    wire.send(Message.CREDIT, 7, frames.credit_body(500))
    offset, data = frames.read_output(wire.expect(Message.STDOUT, 7).body)
    assert (offset, len(data)) == (1000, 500)
    wire.send(Message.CREDIT, 7, frames.credit_body(1 << 30))
    assert heard + 500 + len(rest(wire)) == len("".join(f"{number}\n" for number in range(1, 100001)))


def rest(wire: Wire) -> bytes:
    said = b""
    while (frame := wire.hear()).type == Message.STDOUT:
        said += frames.read_output(frame.body)[1]
    assert frame.type == Message.EXIT
    return said


def test_answers_overtake_output(wire: Wire) -> None:
    wire.sync()
    start(wire, 7, "yes", credit=1 << 31)
    wire.expect(Message.STARTED, 7)
    wire.send(Message.PING, 8)
    overtaken = 0
    while wire.hear().type != Message.PONG:
        overtaken += 1
    assert overtaken < 200  # what socket buffers hold, not what was granted
    wire.send(Message.RELEASE, 7, struct.pack("<I", 0))
    while wire.hear().type != Message.RELEASED:
        pass
    wire.ping()


def test_processes_of_an_earlier_host_run_on_unheard(another_wire: Callable[[], Wire], tmp_path: Path) -> None:
    first = another_wire()
    first.sync()
    start(first, 7, "sh", "-c", f"seq 200000; touch {tmp_path}/done; exec sleep 1000", credit=10)
    first.expect(Message.STARTED, 7)
    second = another_wire()
    assert frames.read_hello(second.sync().body).processes_alive == 1
    start(second, 8, "sh", "-c", f"while [ ! -e {tmp_path}/done ]; do sleep 0.01; done; echo mine")
    second.expect(Message.STARTED, 8)
    assert output(second, 8) == b"mine\n"


def test_what_makes_no_sense_is_answered_and_harms_nothing(wire: Wire) -> None:
    wire.sync()
    wire.send(0x55, 1)
    assert "unknown" in frames.read_error(wire.expect(Message.ERROR, 1).body)
    for kind, body in ((Message.CREDIT, b""), (Message.RELEASE, b"1"), (Message.SIGNAL, b""), (Message.WAKE, bytes(9))):
        wire.send(kind, 2, body)
        assert "malformed" in frames.read_error(wire.expect(Message.ERROR, 2).body)
    wire.send(Message.START, 3, bytes(16))
    assert frames.read_failed(wire.expect(Message.FAILED, 3).body)[0] == frames.FailedReason.INVALID
    wire.send(Message.START_PART, 4, b"x" * 65536)
    start(wire, 5, "echo", "fine")  # takes the place of the unfinished one
    wire.expect(Message.STARTED, 5)
    assert output(wire, 5) == b"fine\n"
    for _ in range(20):
        wire.send(Message.START_PART, 6, b"x" * 65536)  # more than a START may have
    wire.send(Message.START, 6)
    assert frames.read_failed(wire.expect(Message.FAILED, 6).body)[0] == frames.FailedReason.INVALID
    wire.send(Message.RELEASE, 9, bytes(4))
    wire.expect(Message.RELEASED, 9)


def test_stdin_beyond_its_credit_is_refused(wire: Wire) -> None:
    wire.sync()
    start(wire, 7, "sleep", "1000", stdin=True)
    wire.expect(Message.STARTED, 7)
    _, granted = frames.read_credit(wire.expect(Message.CREDIT, 7).body)
    assert 4096 <= granted <= 256 * 1024
    for _ in range(0, 10 * granted, 65536):
        wire.send(Message.STDIN, 7, bytes(65536))
    kinds = set()
    wire.send(Message.PING, 8)
    while (frame := wire.hear()).type != Message.PONG:
        kinds.add(Message(frame.type))
    assert Message.ERROR in kinds


def test_an_id_in_use_is_refused(wire: Wire) -> None:
    wire.sync()
    start(wire, 7, "sleep", "1000")
    wire.expect(Message.STARTED, 7)
    start(wire, 7, "true")
    assert "in use" in frames.read_failed(wire.expect(Message.FAILED, 7).body)[1]
