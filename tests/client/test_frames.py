"""WebSocket frames of our own, against those of wsproto, and against what no server should send."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameProtocol, Opcode

from noid.client import frames
from noid.client.channels import UNSENT_BYTES_MAX, Channels, Closed, Malformed

SIZES = (0, 1, 125, 126, 127, 65535, 65536, 70001)


def fed(incoming: frames.Incoming, data: bytes, at_once: int) -> list[frames.Piece]:
    return [piece for start in range(0, len(data), at_once) for piece in incoming.feed(data[start : start + at_once])]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("opcode", [frames.TEXT, frames.BINARY])
def test_what_is_sent_is_what_another_codec_reads(opcode: int, size: int) -> None:
    data = (bytes(range(128)) * (size // 128 + 1))[:size]
    server = FrameProtocol(client=False, extensions=[])
    server.receive_bytes(frames.frame(opcode, data))
    received = list(server.received_frames())
    assert {frame.opcode for frame in received} == {Opcode(opcode)}
    assert received[-1].message_finished
    parts = [part.encode() if isinstance(part, str) else bytes(part) for part in (frame.payload for frame in received)]
    assert b"".join(parts) == data


def test_no_two_frames_have_the_same_mask() -> None:
    assert len({frames.frame(frames.BINARY, b"the same") for _ in range(100)}) == 100


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.booleans(), st.none() | st.binary(max_size=125)), max_size=5),
    st.integers(1, 400),
)
def test_what_another_codec_sends_is_read_however_it_is_cut(
    parts: list[tuple[bytes, bool, bytes | None]], at_once: int
) -> None:
    server = FrameProtocol(client=False, extensions=[])
    sent, messages, pings, message = b"", [], [], b""
    for data, finished, ping in parts:
        sent += server.send_data(data, finished)
        message += data
        if finished:
            messages.append(message)
            message = b""
        if ping is not None:  # between the pieces of a message, too
            sent += server.ping(ping)
            pings.append(ping)
    read, heard, text = [], [], b""
    for opcode, data, ends in fed(frames.Incoming(), sent, at_once):
        if opcode == frames.PING:
            heard.append(data)
            continue
        assert opcode == frames.BINARY
        text += data
        if ends:
            read.append(text)
            text = b""
    assert (read, heard, text) == (messages, pings, message)


@pytest.mark.parametrize("size", SIZES)
def test_every_way_to_write_a_length_is_read(size: int) -> None:
    data = b"x" * size
    sent = FrameProtocol(client=False, extensions=[]).send_data(data, True)
    pieces = fed(frames.Incoming(), sent, 1000)
    assert b"".join(part for _, part, _ in pieces) == data
    assert [ends for _, _, ends in pieces] == [False] * (len(pieces) - 1) + [True]


def test_data_is_passed_on_before_its_frame_is_there() -> None:
    incoming = frames.Incoming(b"\x82\x7f" + (1 << 40).to_bytes(8, "big"))
    assert list(incoming.feed(b"beginning")) == [(frames.BINARY, b"beginning", False)]
    assert list(incoming.feed(b"")) == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xc2\x00", "not agreed on"),
        (b"\x83\x00", "not agreed on"),
        (b"\x8f\x00", "not agreed on"),
        (b"\x82\x80", "masked"),
        (b"\x09\x00", "control frame in pieces"),
        (b"\x89\x7e\x00\x80", "control frame in pieces"),
        (b"\x80\x00", "begins in the middle"),
        (b"\x02\x00\x82\x00", "in that of another"),
        (b"\x82\x7f" + b"\xff" * 8, "unreasonable length"),
        (b"\x81\x01\xff", "not UTF-8"),
        (b"\x88\x01\x03", "half a code"),
        (b"\x88\x03\x03\xe8\xff", "not UTF-8"),
    ],
)
def test_what_is_no_websocket_is_told_so(data: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        list(Channels(plain=True).receive(data))


@given(st.binary(max_size=200), st.integers(1, 50))
def test_nothing_that_comes_is_more_than_malformed(data: bytes, at_once: int) -> None:
    channels = Channels()
    try:
        for start in range(0, len(data), at_once):
            list(channels.receive(data[start : start + at_once]))
    except Malformed:
        pass


def test_a_text_without_end_is_refused_before_it_fills_the_memory() -> None:
    channels = Channels()
    endless = b"\x01\x7f" + (1 << 40).to_bytes(8, "big")
    with pytest.raises(Malformed, match="endless"):
        list(itertools.chain.from_iterable(map(channels.receive, (endless, *[b"x" * 65536] * 100))))


def test_a_goodbye_is_read_and_answered_once_and_nothing_after_it_counts() -> None:
    channels = Channels()
    said = b"\x88\x06\x03\xf4gone" + b"\x81\x05after"
    assert list(channels.receive(said)) == [Closed(code=1012, reason="gone")]
    server = FrameProtocol(client=False, extensions=[])
    server.receive_bytes(channels.goodbye())
    assert [frame.opcode for frame in server.received_frames()] == [Opcode.CLOSE]
    assert channels.goodbye() == b""
    assert list(Channels().receive(b"\x88\x00")) == [Closed(code=1005, reason="")]


def test_pings_are_answered_and_a_flood_of_them_is_no_flood_of_ours() -> None:
    channels = Channels()
    assert list(channels.receive(b"\x89\x02hi")) == []
    server = FrameProtocol(client=False, extensions=[])
    server.receive_bytes(bytes(channels.unsent))
    assert [(frame.opcode, bytes(frame.payload)) for frame in server.received_frames()] == [(Opcode.PONG, b"hi")]
    list(channels.receive((b"\x89\x7d" + b"x" * 125) * 10_000))
    assert len(channels.unsent) < UNSENT_BYTES_MAX + 200
