"""The codec: frames survive being cut, damaged and mixed with other conversations; bodies are bounded."""

from __future__ import annotations

import itertools
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from noid_exec_vsock import frames
from noid_exec_vsock.frames import Frame, FrameDecoder, Message, ProtocolError, encode

from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest

EPOCH = 0x7D7E0102
stuffed = st.lists(st.sampled_from([b"\x7e", b"\x7d", b"\x5d", b"\x5e", b"a", b"\x00"]), max_size=60).map(b"".join)
bodies = st.one_of(st.binary(max_size=80), stuffed)
arguments = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
messages = st.builds(Frame, type=st.integers(0, 255), epoch=st.just(EPOCH), id=st.integers(0, 2**32 - 1), body=bodies)


def heard(data: bytes, cuts: list[int], epoch: int | None = EPOCH) -> list[Frame]:
    decoder = FrameDecoder(epoch)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [frame for begin, end in itertools.pairwise(edges) for frame in decoder.feed(data[begin:end])]


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cut_yields_the_same_frames(sent: list[Frame], cuts: list[int]) -> None:
    assert heard(b"".join(map(encode, sent)), cuts) == sent


@given(st.binary(max_size=300), messages, st.lists(st.integers(0, 10_000), max_size=4))
def test_a_frame_after_garbage_is_heard_and_garbage_is_not(garbage: bytes, sent: Frame, cuts: list[int]) -> None:
    assert heard(garbage + encode(sent), cuts) == [sent]


@given(messages, messages, st.integers(1, 10_000))
def test_half_a_frame_costs_only_itself(half: Frame, sent: Frame, at: int) -> None:
    whole = encode(half)
    assert heard(whole[: at % (len(whole) - 1)] + encode(sent), []) == [sent]


@given(messages, st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_frame_is_not_heard(sent: Frame, at: int, flip: int) -> None:
    whole = bytearray(encode(sent))
    whole[at % len(whole)] ^= flip
    assert sent not in heard(bytes(whole), []) or heard(bytes(whole), []) == [sent]  # a damaged *flag* may not matter
    assert all(frame == sent for frame in heard(bytes(whole), []))


@given(messages, st.integers(0, 2**32 - 1).filter(lambda epoch: epoch != EPOCH))
def test_frames_of_another_conversation_are_dropped(sent: Frame, epoch: int) -> None:
    assert heard(encode(sent), [], epoch) == []
    assert heard(encode(sent), [], None) == [sent]


def test_endless_bytes_without_a_flag_are_not_kept() -> None:
    decoder = FrameDecoder(EPOCH)
    for _ in range(64):
        assert list(decoder.feed(b"x" * 65536)) == []
    assert decoder.wasted_bytes == 64 * 65536
    assert len(decoder._pending) <= 2 * (frames.BODY_BYTES_MAX + 13)
    after = Frame(type=Message.PONG, epoch=EPOCH, id=1)
    assert list(decoder.feed(encode(after))) == [after]
    assert decoder.wasted_bytes == 0


def test_a_body_of_the_largest_size_passes_and_one_byte_more_does_not() -> None:
    largest = Frame(type=Message.STDIN, epoch=EPOCH, id=1, body=b"\x7e" * frames.BODY_BYTES_MAX)
    assert heard(encode(largest), [65537]) == [largest]
    with pytest.raises(ValueError, match="65537"):
        encode(Frame(type=Message.STDIN, epoch=EPOCH, id=1, body=bytes(frames.BODY_BYTES_MAX + 1)))
    raw = struct.pack("<BII", Message.STDIN, EPOCH, 1) + bytes(frames.BODY_BYTES_MAX + 1)
    assert heard(b"\x7e" + raw + struct.pack("<I", zlib.adler32(raw)) + b"\x7e", []) == []


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=6
    )
)
def test_arguments_are_told_apart_whatever_is_in_them(argv: list[str]) -> None:
    request = ExecRequest(argv=tuple(argv), env={"A": "1=2"}, cwd="/x", user="me", label="mine")
    assert [*read_texts(frames.start_body(request, credit=1))] == [
        "mine", "me", "/x", len(argv), *argv, 1, "A=1=2",
    ]  # fmt: skip


def read_texts(body: bytes) -> list[str | int]:
    at, found = 16, []

    def number() -> int:
        nonlocal at
        at += 4
        return int(struct.unpack_from("<I", body, at - 4)[0])

    def text() -> str:
        nonlocal at
        length = number()
        at += length
        return body[at - length : at].decode("utf-8", "surrogateescape")

    found = [text(), text(), text(), argc := number(), *(text() for _ in range(argc))]
    found += [envc := number(), *(text() for _ in range(envc))]
    assert at == len(body)
    return found


def test_a_start_of_many_frames_is_split_without_loss() -> None:
    body = bytes(range(256)) * 1000
    parts = frames.start_frames(EPOCH, 7, body)
    assert [part.type for part in parts] == [Message.START_PART] * 3 + [Message.START]
    assert b"".join(part.body for part in parts) == body


def test_exit_says_code_or_signal() -> None:
    usage = struct.pack("<QQQ", 1_500_000, 0, 4)
    assert frames.read_exit(b"\x00\x03" + usage) == ProcessExit(code=3)
    killed = frames.read_exit(b"\x01\x09" + usage)
    assert killed == ProcessExit(code=None, signal=9)
    assert killed.usage is not None
    assert killed.usage.user_secs == 1.5


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (frames.read_hello, b""),
        (frames.read_hello, struct.pack("<HBB", frames.PROTOCOL_VERSION + 1, 0, 0) + bytes(40)),
        (frames.read_exit, b"\x02\x00" + bytes(24)),
        (frames.read_exit, b"\x00\x00" + bytes(25)),
        (frames.read_credit, b"\x01"),
        (frames.read_output, b"\x01"),
        (frames.read_failed, b"\x01\x00\x00\x00\x00\xff\xff\xff\xff"),
        (frames.read_receipt, struct.pack("<H", 1000)),
        (frames.read_receipt, struct.pack("<HI1sBIII", 1, 1, b"x", 3, 0, 0, 0)),
    ],
)
def test_a_malformed_body_is_named(read: object, body: bytes) -> None:
    assert callable(read)
    with pytest.raises(ProtocolError):
        read(body)


def test_what_a_guest_says_cannot_act_on_a_terminal() -> None:
    evil = b"\x1b]0;owned\x07\r\nroot# "
    words = frames.read_error(struct.pack("<I", len(evil)) + evil)
    assert words.isprintable()
    assert words.endswith("root# ")
