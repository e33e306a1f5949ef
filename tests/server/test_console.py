"""The console and logs as the server gives them: history, many viewers, bounds that hurt only who exceeds them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection

from noid.core import wire
from noid.server import console as server_console
from noid.server import hardening
from noid.testing.raw_http import open_ws

Server = Any  # see conftest.py

KIB = 1024
GREETING = b"echo hello\r\nhello\r\n# "


@contextlib.asynccontextmanager
async def opened(web: Server, path: str) -> AsyncIterator[WebSocketConnection]:
    async with open_ws(await trio.open_unix_socket(str(web.config.socket_path)), path) as ws:
        yield ws


def console(web: Server, query: str = "") -> Any:
    return opened(web, f"/v1/vms/web/console{query}")


async def type_(ws: WebSocketConnection, text: bytes) -> None:
    await ws.send_message(wire.frame(wire.STDIN, text))


async def shown(ws: WebSocketConnection, until: bytes) -> bytes:
    """Read the console until it shows *until*."""
    seen = b""
    while until not in seen:
        message = await ws.get_message()
        assert isinstance(message, bytes), message
        assert message[0] == wire.STDOUT
        seen += message[1:]
    return seen


async def last_words(ws: WebSocketConnection) -> tuple[dict[str, Any], int]:
    """Skip output; return the error the server ends with, and the close code."""
    while isinstance(message := await ws.get_message(), bytes):
        pass
    with pytest.raises(ConnectionClosed) as closed:
        await ws.get_message()
    return dict(json.loads(message)), closed.value.reason.code


async def greeted(web: Server) -> bytes:
    """Let the console say something, since a clone's log begins empty; return the whole of it."""
    async with console(web) as ws:
        await type_(ws, b"echo hello\r")
        return await shown(ws, GREETING)


def log_of(web: Server) -> Path:
    live = next(iter(web.agent.services.supervisor._live.values()))
    return Path(live.link.console.log.path)


def punch(path: Path, start: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    with path.open("r+b") as file:
        assert libc.fallocate(file.fileno(), 3, start, length) == 0, os.strerror(ctypes.get_errno())


async def test_what_is_typed_is_run_and_every_viewer_sees_it_with_what_was_before(web: Server) -> None:
    assert await greeted(web) == GREETING
    async with console(web) as writer, console(web, "?readonly") as viewer:
        assert await shown(writer, b"# ") == GREETING
        await type_(viewer, b"echo never\r")
        await type_(writer, b"echo again\r")
        assert await shown(writer, b"\nagain\r\n# ") == b"echo again\r\nagain\r\n# "
        assert await shown(viewer, b"\nagain\r\n# ") == GREETING + b"echo again\r\nagain\r\n# "
        async with console(web, "?history=4") as late:
            assert await shown(late, b"# ") == b"\r\n# "
        async with console(web, "?history=0") as later:
            await type_(writer, b"x")
            assert await shown(later, b"x") == b"x"


async def test_two_writers_type_on_one_line(web: Server) -> None:
    async with console(web) as first, console(web) as second:
        await type_(first, b"echo one")
        await shown(second, b"echo one")
        await type_(second, b" two\r")
        await shown(first, b"\none two\r\n# ")


async def test_what_cannot_be_is_refused_before_the_upgrade(web: Server) -> None:
    for path, status in (
        ("/v1/vms/none/console", 404),
        ("/v1/vms/-/console", 400),
        ("/v1/vms/web/console?history=-1", 400),
        ("/v1/vms/web/console?history=many", 400),
        ("/v1/vms/web/logs/none", 404),
        ("/v1/vms/web/logs/console?offset=x", 400),
    ):
        with pytest.raises(ConnectionRejected) as refused:
            async with opened(web, path):
                pass
        assert refused.value.status_code == status, path
    assert (await web.ask("GET", "/v1/vms/web/console")).status == 426
    assert (await web.refused("GET", "/v1/vms/web/logs/none"))[:2] == (404, "not_found")


async def test_a_vm_that_does_not_run_has_no_console_but_its_log(web: Server) -> None:
    await greeted(web)
    async with console(web) as ws:
        await type_(ws, b"poweroff\r")
        said, code = await last_words(ws)
    assert (said["code"], code) == ("unavailable", 1000)
    assert "has ended" in said["error"]
    while (await web.ask("GET", "/v1/vms/web")).json()["state"] != "stopped":
        await trio.lowlevel.checkpoint()  # the machine's end is written down just after it is seen
    with pytest.raises(ConnectionRejected) as refused:
        async with console(web):
            pass
    assert refused.value.status_code == 409
    assert json.loads(refused.value.body)["error"].startswith("cannot open the console of VM 'web': it is stopped.")
    answer = await web.ask("GET", "/v1/vms/web/logs/console?follow")
    assert (answer.status, answer.body) == (200, GREETING + b"poweroff\r\n")
    assert (await web.ask("GET", "/v1/vms/web/logs")).json() == [
        {"name": "console", "bytes": len(answer.body), "gaps": [], "growing": False}
    ]


async def test_a_restore_in_place_ends_the_consoles_of_the_machine_it_replaces(web: Server) -> None:
    made = await web.ask("POST", "/v1/vms/web/checkpoints")
    async with console(web) as ws:
        await web.ask("POST", "/v1/vms/web/restore", {"checkpoint_id": made.json()["id"]})
        said, _ = await last_words(ws)
    assert "replaced by a restore" in said["error"]
    async with console(web) as ws:
        await type_(ws, b"echo after\r")
        assert await shown(ws, b"\nafter\r\n# ") == b"echo after\r\nafter\r\n# "  # the log begins with the machine


async def test_nothing_for_a_while_detaches_and_typing_or_printing_does_not(
    web: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    object.__setattr__(web.agent.config, "console_timeout_secs", 0.5)
    async with console(web) as ws:
        began = trio.current_time()
        for _ in range(4):
            await type_(ws, b"x")
            await trio.sleep(0.25)  # the user's time
        said, code = await last_words(ws)
    assert trio.current_time() - began > 1.2
    assert (said["code"], code) == ("deadline", 1000)
    assert said["error"].startswith("nothing was typed or printed for 0.5 s")


async def test_input_a_guest_does_not_read_is_dropped_and_its_writer_told(
    web: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_console, "INPUT_SECS", 0.3)
    machine = next(iter(web.agent.services.supervisor._live.values())).machine
    async with console(web) as ws, console(web) as other:
        await machine.pause()
        await type_(ws, bytes(512 * KIB))
        told = json.loads(await ws.get_message())
        assert 0 < told["dropped"]["bytes"] < 512 * KIB
        assert "has not read its console" in told["dropped"]["why"]
        assert (await web.ask("GET", "/v1/vms/web")).status == 200
        await machine.resume()
        await type_(other, b"\x03")
        await shown(ws, b"^C")


async def test_a_viewer_that_does_not_read_is_dropped_and_holds_up_nobody(web: Server) -> None:
    async with console(web) as ws, console(web, "?readonly"), console(web) as quick:
        path = log_of(web)
        await type_(ws, b"yes\r")  # and neither ws nor the one beside it reads on
        seen = 0
        while seen < 2048 * KIB:
            seen += len(await quick.get_message())
        await type_(quick, b"\x03")
        await shown(quick, b"^C")
        assert path.stat().st_size >= 2048 * KIB


async def test_a_viewer_that_fell_behind_what_is_kept_is_told_so(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening.TcpServer, "_write_deadline", lambda _: math.inf)  # else it is dropped for its sloth
    await greeted(web)
    async with console(web, "?readonly") as slow, console(web) as writer:
        path = log_of(web)
        await type_(writer, b"yes\r")
        while path.stat().st_size < 3072 * KIB:
            await writer.get_message()
        await type_(writer, b"\x03")
        punch(path, 4096, 2048 * KIB)
        said, _ = await last_words(slow)
        assert "prints faster than this client reads" in said["error"]
        async with console(web, f"?history={1 << 40}") as late:
            assert (await late.get_message())[1:].startswith(GREETING)
            assert json.loads(await late.get_message()) == {"gap": {"start": 4096, "end": 4096 + 2048 * KIB}}
            await shown(late, b"^C")


async def test_the_size_of_the_terminal_reaches_the_guest(web: Server) -> None:
    async with console(web) as ws:
        await ws.send_message(wire.frame(wire.RESIZE, b"odd"))
        await ws.send_message(wire.resize_frame(132, 43))
        await type_(ws, b"echo sized\r")
        await shown(ws, b"\nsized\r\n")
        while (await web.run("cat", "/run/console_size"))["stdout"] != "132 43\n":
            await trio.lowlevel.checkpoint()  # it takes its own way to the guest


async def test_consoles_count_as_sessions(web: Server) -> None:
    object.__setattr__(web.config, "max_ws_sessions", 1)
    async with console(web):
        with pytest.raises(ConnectionRejected) as refused:
            async with console(web):
                pass
    assert refused.value.status_code == 503


# --- logs ------------------------------------------------------------------------------------------------------------


async def test_a_log_is_read_whole_and_in_parts(web: Server) -> None:
    whole = await greeted(web)
    for asked, status, body, where in (
        (None, 200, whole, None),
        ("bytes=0-8", 206, whole[:9], "bytes 0-8/21"),
        ("bytes=10-", 206, whole[10:], "bytes 10-20/21"),
        ("bytes=-2", 206, whole[-2:], "bytes 19-20/21"),
        ("bytes=-200", 206, whole, "bytes 0-20/21"),
        ("bytes=5-999", 206, whole[5:], "bytes 5-20/21"),
        ("bytes=21-", 416, None, "bytes */21"),
        ("bytes=7-3", 416, None, "bytes */21"),
        ("bytes=0-1,3-4", 200, whole, None),
        ("lines=1-2", 200, whole, None),
    ):
        answer = await web.ask("GET", "/v1/vms/web/logs/console", headers={} if asked is None else {"range": asked})
        assert (answer.status, answer.headers.get("content-range")) == (status, where), asked
        if body is not None:
            assert answer.body == body, asked


async def test_a_gap_is_left_out_and_said_and_ranges_stop_at_it(web: Server) -> None:
    path = log_of(web)
    with path.open("ab") as file:
        file.write(b"." * (300 * KIB - path.stat().st_size))
    punch(path, 64 * KIB, 128 * KIB)
    log = "/v1/vms/web/logs/console"
    answer = await web.ask("GET", log)
    assert (len(answer.body), answer.headers["noid-log-gap"]) == (172 * KIB, f"{64 * KIB}-{192 * KIB - 1}")
    for asked, where in (
        (f"bytes={60 * KIB}-", f"bytes {60 * KIB}-{64 * KIB - 1}/{300 * KIB}"),
        (f"bytes={70 * KIB}-", f"bytes {192 * KIB}-{300 * KIB - 1}/{300 * KIB}"),
        (f"bytes=-{10 * KIB}", f"bytes {290 * KIB}-{300 * KIB - 1}/{300 * KIB}"),
    ):
        answer = await web.ask("GET", log, headers={"range": asked})
        assert (answer.status, answer.headers["content-range"]) == (206, where)
        assert "noid-log-gap" not in answer.headers
    inside = await web.ask("GET", log, headers={"range": f"bytes={70 * KIB}-{80 * KIB}"})
    assert inside.status == 416
    async with opened(web, f"{log}?offset={60 * KIB}") as ws:
        assert json.loads(await ws.get_message()) == {"log": {"offset": 60 * KIB}}
        assert len(await ws.get_message()) == 1 + 4 * KIB
        assert json.loads(await ws.get_message()) == {"gap": {"start": 64 * KIB, "end": 192 * KIB}}
        while isinstance(message := await ws.get_message(), bytes):
            assert message[0] == wire.STDOUT
        assert json.loads(message) == {"end": {"offset": 300 * KIB}}


@pytest.mark.parametrize("path", ["/v1/vms/web/logs/console?follow", "/v1/vms/web/logs?follow=1"])
async def test_a_log_is_followed_over_both(web: Server, path: str) -> None:
    whole = await greeted(web)
    client = await web.unix()
    await client.send("GET", path, headers={"range": "bytes=-2"})
    received = b""
    async with opened(web, "/v1/vms/web/logs/console?offset=-2&follow") as ws, console(web, "?history=0") as typist:
        assert json.loads(await ws.get_message()) == {"log": {"offset": len(whole) - 2}}
        assert await shown(ws, b"# ") == b"# "
        await type_(typist, b"poweroff\r")
        assert await shown(ws, b"\n") == b"poweroff\r\n"
        assert json.loads(await ws.get_message()) == {"end": {"offset": len(whole) + 10}}
    while not received.endswith(b"0\r\n\r\n"):
        received += await client.stream.receive_some()
    _, _, chunks = received.partition(b"\r\n\r\n")
    said = b""
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        said, chunks = said + chunks[: int(size, 16)], chunks[int(size, 16) + 2 :]
    assert said == b"# poweroff\r\n"


async def test_the_logs_of_others_are_not_found(web: Server) -> None:
    token = await web.add_user("eve")
    for path in ("/v1/vms/web/logs", "/v1/vms/web/logs/console", "/v1/vms/web/console"):
        assert (await web.ask("GET", path, token=token)).status in (404, 426), path
    with pytest.raises(ConnectionRejected) as refused:
        async with open_ws(await web._tcp_stream(), "/v1/vms/web/console", {"authorization": f"Bearer {token}"}):
            pass
    assert refused.value.status_code == 404
