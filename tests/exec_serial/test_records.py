"""Records are found in anything, however it is cut; what is damaged is mended or said to be lost, never wrong."""

from __future__ import annotations

import base64
import re

from hypothesis import given, settings
from hypothesis import strategies as st
from noid_exec_serial import script
from noid_exec_serial.output import Assembler, Lost, Output, cksum
from noid_exec_serial.records import Record, RecordDecoder

NONCE = "0123456789"
MARK = script.end_mark(NONCE)


def typed(*records: str) -> bytes:
    return b"".join(f"@{NONCE} {record} {NONCE}@\r\n".encode() for record in records)


def printed(data: bytes, block_bytes: int = 500, piece_chars: int = 64) -> list[str]:
    """Return the records the guest's encoder prints for *data*."""
    records = []
    blocks = [data[at : at + block_bytes] for at in range(0, len(data), block_bytes)]
    for number, block in enumerate(blocks):
        text = base64.b64encode(block).decode()
        pieces = [text[at : at + piece_chars] for at in range(0, len(text), piece_chars)]
        records += [f"d 1 {number} {index} {len(piece)} {piece}" for index, piece in enumerate(pieces)]
        records += [f"b 1 {number} {len(pieces)} {len(text)} {cksum(text.encode())}"] * 2
    return [*records, f"z 1 {len(blocks)}", f"z 1 {len(blocks)}"]


def heard(stream: bytes, *, cut: int = 4096) -> tuple[bytes, list[Lost], bool]:
    stream += typed("q")  # something always follows
    decoder, assembler = RecordDecoder(NONCE), Assembler(1, "base64", MARK)
    found = [
        item
        for at in range(0, len(stream), cut)
        for record in decoder.feed(stream[at : at + cut])
        if record.kind in "dbz"
        for item in assembler.take(record)
    ]
    data = b"".join(item.data for item in found if isinstance(item, Output))
    return data, [item for item in found if isinstance(item, Lost)], assembler.ended


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=3000), cut=st.integers(1, 700))
def test_output_is_put_together_wherever_the_line_is_cut(data: bytes, cut: int) -> None:
    assert heard(b"$ " + typed(*printed(data + MARK)) + b"$ ", cut=cut) == (data, [], True)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(min_size=1, max_size=1500), where=st.lists(st.integers(0, 10_000), min_size=1, max_size=3))
def test_kernel_messages_in_the_middle_of_output_do_no_harm(data: bytes, where: list[int]) -> None:
    stream = typed(*printed(data + MARK))
    places = {place % len(stream) for place in where}  # the kernel does not interrupt its own messages
    for number, at in enumerate(sorted(places, reverse=True)):
        stream = stream[:at] + f"[   12.{number:06}] usb 1-1: new @device~\r\n".encode() + stream[at:]
    assert heard(stream) == (data, [], True)


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(min_size=200, max_size=1500),
    place=st.integers(0, 10_000),
    noise=st.text("abcXYZ019 +/", max_size=30),
)
def test_a_line_of_anybodys_in_the_middle_is_taken_out_again_or_costs_one_block(
    data: bytes, place: int, noise: str
) -> None:
    stream = typed(*printed(data + MARK))
    at = place % len(stream)
    found, lost, ended = heard(stream[:at] + noise.encode() + b"\r\n" + stream[at:])
    if lost:  # between digits nobody can tell where the stranger's line began
        assert re.search(rb"@%s [bd][ 0-9]*\Z" % NONCE.encode(), stream[:at])
        assert len(lost) == 1
        assert found in data
    else:
        assert (found, ended) == (data, True)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=1500),
    damages=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 12), st.binary(max_size=12)), max_size=6),
)
def test_output_that_was_damaged_is_missing_and_never_wrong(data: bytes, damages: list[tuple[int, int, bytes]]) -> None:
    stream = typed(*printed(data + MARK, block_bytes=100))
    for place, dropped, put in damages:
        at = place % len(stream)
        stream = stream[:at] + put + stream[at + dropped :]
    decoder, assembler = RecordDecoder(NONCE), Assembler(1, "base64", MARK)
    blocks = {(data + MARK)[at : at + 100] for at in range(0, len(data + MARK), 100)}
    for record in decoder.feed(stream):
        for item in assembler.take(record):
            if isinstance(item, Output):  # whole blocks, or what the end mark left of one
                assert any(item.data in block or block in item.data for block in blocks) or item.data in data


def test_an_echo_is_no_record() -> None:
    decoder = RecordDecoder(NONCE)
    lines = [
        script.first_line(NONCE),
        script.question(NONCE),
        *script.program([b"x"], [], user=b"", cwd=b"", stdin=True),
    ]
    assert list(decoder.feed(b"\r\n".join(lines))) == []


def test_records_of_another_command_and_of_no_shape_are_none() -> None:
    decoder = RecordDecoder(NONCE)
    other = typed("x 0 0").replace(NONCE.encode(), b"9876543210")
    assert list(decoder.feed(other + typed("x 1 0", "x 1000 1000", "y", "d 1 0 0 3 AAAA", "x 7 7"))) == [
        Record("x", ("7", "7"))
    ]


def test_a_hostile_guest_cannot_make_the_host_think_long_or_keep_much() -> None:
    decoder = RecordDecoder(NONCE)
    torn = f"@{NONCE} d 1 0 0 700 ".encode() + b"A\n" * 300 + f" {NONCE}@\n".encode()
    for _ in range(300):
        assert list(decoder.feed(torn + b"@" * 5000)) == []
    assert len(decoder._pending) < 20_000
