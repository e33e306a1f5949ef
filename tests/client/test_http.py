"""The HTTP parser: however an answer is cut, it says the same, and nonsense is an error with a reason."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noid.client.errors import ConnectionFailed, ConnectionLost
from noid.client.http import BODY_BYTES_MAX, HEAD_BYTES_MAX, Incoming
from noid.client.settings import Endpoint
from noid.client.waiting import finished
from noid.errors import NoidError

ENDPOINT = Endpoint(socket_path=Path("/agent.sock"))


class Wire:
    """What arrives, cut where it is told."""

    def __init__(self, data: bytes, cuts: list[int] | None = None) -> None:
        places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
        self._pieces = [data[a:b] for a, b in itertools.pairwise(places)]

    async def receive(self, _: float | None) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


def answer(data: bytes, cuts: list[int] | None = None, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Return the whole answer that *data* is."""
    incoming = Incoming(Wire(data, cuts).receive, ENDPOINT, None)
    status, headers = finished(incoming.head())
    return status, headers, finished(incoming.body(method, status, headers))


def pieces(data: bytes, cuts: list[int] | None = None) -> bytes:
    """Return its body, read piece by piece."""
    incoming = Incoming(Wire(data, cuts).receive, ENDPOINT, None)
    _, headers = finished(incoming.head())
    body = b""
    while piece := finished(incoming.piece(headers)):
        body += piece
    assert finished(incoming.piece(headers)) == b""
    return body


def chunked(body: bytes, sizes: list[int]) -> bytes:
    """Return *body* as chunks of *sizes*, and the rest as one."""
    wire, at = b"", 0
    for size in [*sizes, len(body)]:
        if part := body[at : at + size]:
            wire += b"%X;ext=1\r\n%b\r\n" % (len(part), part)
        at += len(part)
    return wire + b"0\r\n\r\n"


bodies = st.binary(max_size=300)
cuts = st.lists(st.integers(min_value=0, max_value=2000), max_size=30)
interim = st.integers(min_value=0, max_value=3).map(lambda n: b"HTTP/1.1 100 Continue\r\n\r\n" * n)


@given(bodies, cuts, interim)
def test_an_answer_with_a_length_is_the_same_however_it_is_cut(body: bytes, cuts: list[int], interim: bytes) -> None:
    data = (
        interim
        + b"HTTP/1.1 201 Made\r\nContent-Length: %d\r\nX-Two: 1\r\nx-two:2 \r\n\r\n" % len(body)
        + body
        + b"more"
    )
    assert answer(data, cuts) == (201, {"content-length": str(len(body)), "x-two": "2"}, body)
    assert pieces(data, cuts) == body


@given(bodies, st.lists(st.integers(min_value=1, max_value=100), max_size=10), cuts, interim)
def test_an_answer_in_chunks_is_the_same_however_it_is_cut(
    body: bytes, sizes: list[int], cuts: list[int], interim: bytes
) -> None:
    data = interim + b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(body, sizes)
    assert answer(data, cuts)[2] == body
    assert pieces(data, cuts) == body


@given(bodies, cuts)
def test_an_answer_without_a_length_ends_with_the_connection(body: bytes, cuts: list[int]) -> None:
    assert answer(b"HTTP/1.0 200 OK\r\n\r\n" + body, cuts)[2] == body


@given(bodies.filter(bool), st.data())
def test_an_answer_that_is_cut_off_is_a_lost_connection(body: bytes, data: st.DataObject) -> None:
    for whole in (
        b"HTTP/1.1 200\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(body, [])[:-4],
    ):
        part = whole[: data.draw(st.integers(min_value=0, max_value=len(whole) - 1))]
        for read in (answer, pieces):
            with pytest.raises(ConnectionLost):
                read(part)


@given(st.binary(max_size=200), cuts)
def test_whatever_comes_is_an_answer_or_an_error_with_a_reason(data: bytes, cuts: list[int]) -> None:
    for read in (answer, pieces):
        for prefix in (b"", b"HTTP/1.1 200\r\n", b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n"):
            outcomes: list[Any] = []
            for where in (cuts, []):
                try:
                    outcomes.append(read(prefix + data, where))
                except NoidError as error:
                    outcomes.append((type(error), str(error)))
            assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP"),
        (b"", "no answer: it closed the connection"),
        (b"HTTP/1.1 2", "nothing more: it closed the connection"),
        (b"HTTP/1.1 200\r\n" + b"x: y\r\n" * (HEAD_BYTES_MAX // 6 + 2), "endless headers"),
        (b"HTTP/1.1 200\r\nContent-Length: -1\r\n\r\n", "unreasonable length"),
        (b"HTTP/1.1 200\r\nContent-Length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1), "unreasonable length"),
        (b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (BODY_BYTES_MAX + 1), "unreasonable length"),
        (b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\nyes\r\n", "a malformed answer"),
        (b"HTTP/1.1 200\r\nX-Noid-Api-Version: 2\r\n\r\n", "speaks version '2' of the API"),
    ],
)
def test_nonsense_is_refused_with_its_reason(data: bytes, why: str) -> None:
    with pytest.raises(NoidError, match=why):
        answer(data)


def test_a_silence_is_said() -> None:
    async def silence(_: float | None) -> bytes:
        raise TimeoutError

    with pytest.raises(ConnectionFailed, match="no answer for 30 s") as failed:
        finished(Incoming(silence, ENDPOINT, 30.0).head())
    assert not isinstance(failed.value, ConnectionLost)  # it is there, and may be carrying it out
