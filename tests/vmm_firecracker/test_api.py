"""The client of Firecracker's API: one connection for many calls, and Firecracker's own words in every error."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import noid_vmm_firecracker.api
import pytest
import trio
import trio.testing
from noid_vmm_firecracker.api import FirecrackerApi, Refused, Snapshot, words_of

from noid.errors import BackendError, DependencyDown

BYE = b"\0"
OK = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"


async def listening(path: Path) -> trio.socket.SocketType:
    socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await socket.bind(str(path))
    socket.listen(5)
    return socket


@asynccontextmanager
async def answering(path: Path, *answers: bytes) -> AsyncIterator[list[int]]:
    """Be Firecracker at *path*: one answer for each request. Yields the requests by connection.

    An empty one hangs up, and so does one that ends with `BYE`, which is not sent.
    """
    requests: list[int] = []
    left = list(answers)

    async def serve(stream: trio.SocketStream) -> None:
        requests.append(0)
        number = len(requests) - 1
        while await stream.receive_some(65536):
            requests[number] += 1
            answer = left.pop(0)
            if not answer:
                return
            await stream.send_all(answer.removesuffix(BYE))
            if answer.endswith(BYE):
                return

    socket = await listening(path)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(socket)])
        yield requests
        nursery.cancel_scope.cancel()


def refusal(body: bytes) -> bytes:
    return b"HTTP/1.1 400 \r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


async def test_many_calls_take_one_connection(data_dir: Path) -> None:
    api = FirecrackerApi(data_dir / "api.sock")
    async with answering(data_dir / "api.sock", OK, refusal(b'{"fault_message":"no"}'), OK) as requests:
        await api.pause()
        with pytest.raises(Refused, match=r"PATCH /vm \(400\): no"):
            await api.pause()
        await api.resume()
        assert requests == [3]
        await api.aclose()


async def test_an_answer_is_read_anew_whenever_a_byte_of_it_differs(data_dir: Path) -> None:
    api = FirecrackerApi(data_dir / "api.sock")
    pieces = b"HTTP/1.1 100 Continue\r\n\r\n"
    last = OK.replace(b"keep-alive", b"close")
    answers = (OK, OK, pieces + OK, refusal(b'{"fault_message":"no"}'), OK, last, OK)
    async with answering(data_dir / "api.sock", *answers) as requests:
        for _ in range(3):
            await api.pause()
        with pytest.raises(Refused, match=r"PATCH /vm \(400\): no"):
            await api.pause()
        await api.pause()
        await api.pause()
        assert requests == [6]
        await api.pause()
        assert requests == [6, 1]  # it had said that it closes
        await api.aclose()


async def test_what_was_made_ready_for_a_pause_is_said_once_and_only_if_it_is_that(data_dir: Path) -> None:
    heard = bytearray()

    async def hear(stream: trio.SocketStream) -> None:
        while data := await stream.receive_some(65536):
            heard.extend(data)
            await stream.send_all(OK)

    def snapshot(name: str, *, diff: bool = True) -> Snapshot:
        return Snapshot(state=Path("/s"), memory=Path(name), diff=diff)

    api = FirecrackerApi(data_dir / "api.sock")
    listener = trio.SocketListener(await listening(data_dir / "api.sock"))
    wanted = [snapshot("/two"), snapshot("/one", diff=False), snapshot("/one"), snapshot("/one")]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, hear, [listener])
        api.rehearse_pause(snapshot("/one"))
        for each in wanted:
            await api.pause()
            await api.create_snapshot(each)
            await api.resume()
        await api.aclose()
        nursery.cancel_scope.cancel()
    pauses = [({"state": "Paused"}, each.wanted(), {"state": "Resumed"}) for each in wanted]
    bodies = re.findall(rb"\r\n\r\n({.*?})", heard)
    assert [json.loads(body) for body in bodies] == [said for pause in pauses for said in pause]


async def test_a_cancelled_call_costs_its_connection_and_nobody_gets_its_answer(data_dir: Path) -> None:
    api = FirecrackerApi(data_dir / "api.sock")
    async with answering(data_dir / "api.sock", b"HTTP/1.1 2", OK) as requests:
        with trio.move_on_after(0.2):
            await api.pause()
        await trio.testing.wait_all_tasks_blocked()  # by then it has ended
        await api.resume()
        assert requests == [1, 1]
        await api.aclose()


async def test_an_answer_that_does_not_come_is_not_waited_for(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noid_vmm_firecracker.api, "DEADLINE_SECS", 0.2)
    api = FirecrackerApi(data_dir / "api.sock")
    async with answering(data_dir / "api.sock", b"HTTP/1.1 2"):
        with pytest.raises(DependencyDown, match=r"did not answer PATCH /vm within 0\.2 s"):
            await api.pause()
        await api.aclose()


async def test_an_end_without_an_answer_is_told_as_what_it_is(data_dir: Path) -> None:
    api = FirecrackerApi(data_dir / "api.sock")
    async with answering(data_dir / "api.sock", b""):
        with trio.fail_after(5), pytest.raises(DependencyDown, match="ended"):
            await api.state()
        await api.aclose()


async def test_a_connection_that_was_ended_meanwhile_is_made_again(data_dir: Path) -> None:
    api = FirecrackerApi(data_dir / "api.sock")
    async with answering(data_dir / "api.sock", OK + BYE, OK) as requests:
        await api.pause()
        await trio.testing.wait_all_tasks_blocked()  # by then it has ended
        await api.resume()
        assert requests == [1, 1]
        await api.aclose()


async def test_what_is_no_http_and_what_is_no_json_is_an_error(data_dir: Path) -> None:
    api = FirecrackerApi(data_dir / "api.sock")
    junk = b"HTTP/1.1 200 \r\nContent-Length: 4\r\n\r\njunk"
    async with answering(data_dir / "api.sock", b"I am a teapot\r\n\r\n", junk, junk.replace(b"junk", b"[[]]")):
        with pytest.raises(BackendError, match="not Firecracker"):
            await api.state()
        with pytest.raises(BackendError, match="no JSON"):
            await api.state()
        with pytest.raises(BackendError, match="has no state"):
            await api.state()
        await api.aclose()


def test_words_are_found_in_what_is_no_json_too() -> None:
    assert words_of(b'{"fault_message":"no"}') == "no"
    assert words_of(b'{ "error": "No.\nAll previous unanswered requests will be dropped." }').startswith("No. All")
    assert words_of(b"<h1>no</h1>") == "<h1>no</h1>"
    assert words_of(b"") == "(without a word)"
    assert len(words_of(b"x" * 100_000)) == 2000
