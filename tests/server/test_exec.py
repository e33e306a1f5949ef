"""Exec over a WebSocket and by POST: streams that live, ends that are told, processes that end with their client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionRejected

from noid.core.wire import STDERR, STDIN, STDOUT, ErrorResponse, ExecResult
from noid.server import streams, websockets
from noid.testing.faults import fail, hang
from noid.testing.processes import kill_marked
from noid.testing.raw_http import open_ws

Server = Any  # see conftest.py

COUNTER = "/dev/shm/n"
DONE = ExecResult(exit_code=0)


async def ticks_no_more(web: Server) -> None:
    """Return when the process that counts in the guest, a tick each 50 ms, is no more. The deadline is the test's."""
    before = None
    while (now := (await web.run("cat", COUNTER))["stdout"]) != before:
        before = now
        await trio.sleep(0.3)  # the guest's time, six ticks of it


# --- WebSocket -------------------------------------------------------------------------------------------------------


async def test_output_comes_as_it_is_written_each_stream_on_its_channel(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("sh", "-c", "echo out; echo err >&2; cat; exit 3", stdin=True)
        assert {await run.next(), await run.next()} == {(STDOUT, b"out\n"), (STDERR, b"err\n")}
        await run.feed(b"while it runs")
        await run.until(b"while it runs")
        await run.feed(b"")
        assert await run.result() == ({}, ExecResult(exit_code=3), 1000)


async def test_f_an_empty_input_frame_is_the_end_and_what_follows_it_is_ignored(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("cat", stdin=True)
        await run.feed(b"one ")
        await run.feed(b"two")
        await run.feed(b"")
        await run.feed(b"three")
        output, reply, code = await run.result()
    assert (output, reply, code) == ({STDOUT: b"one two"}, DONE, 1000)


async def test_every_byte_of_input_comes_back(web: Server) -> None:
    data = bytes(range(256)) * 4096
    async with web.exec() as run, trio.open_nursery() as nursery:
        await run.ask("cat", stdin=True)

        async def feed() -> None:
            for at in range(0, len(data), 100_000):
                await run.feed(data[at : at + 100_000])
            await run.feed(b"")

        nursery.start_soon(feed)
        output, reply, _ = await run.result()
    assert (output[STDOUT] == data, reply) == (True, DONE)


async def test_without_stdin_in_the_request_there_is_no_input(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("cat")
        await run.feed(b"ignored")
        assert await run.result() == ({}, DONE, 1000)


async def test_messages_nobody_knows_are_ignored(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("cat", stdin=True)
        for message in (b"", b"\x09unknown", b"\x04\0\x50\0\x18", '{"resize": 1}', b"\x01not yours"):
            await run.ws.send_message(message)
        await run.feed(b"known")
        await run.feed(b"")
        assert await run.result() == ({STDOUT: b"known"}, DONE, 1000)


async def test_environment_directory_and_user_are_the_requests(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("sh", "-c", "env; pwd; id -un", env={"X": "a b\n=c"}, cwd="/var", user="noid")
        output, reply, _ = await run.result()
    lines = output[STDOUT].decode().splitlines()
    assert reply == DONE
    assert lines[-2:] == ["/var", "noid"]
    assert ("X=a b" in lines, "=c" in lines) == (True, True)


async def test_a_command_that_takes_too_long_is_ended_and_what_it_wrote_was_sent(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("sh", "-c", f"echo begun; count {COUNTER}", timeout_secs=0.3)
        output, reply, code = await run.result()
    assert (output, reply, code) == ({STDOUT: b"begun\n"}, ExecResult(exit_code=None, timed_out=True), 1000)
    await ticks_no_more(web)


async def test_a_signal_is_told_beside_the_shells_code(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("sh", "-c", "echo begun; sleep 60")
        await run.until(b"begun\n")
        user = web.agent.local_user()
        async with web.agent.guests.reach(user, "web") as guest:
            for process in list(guest._processes.values()):
                await process.signal(9)
        assert (await run.result())[1] == ExecResult(exit_code=137, signal=9)


async def test_a_program_that_does_not_exist_is_127(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("no-such-program")
        assert (await run.result())[1] == ExecResult(exit_code=127)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "'command' must be a list of strings"),
        ('{"command": "true"}', "'command' must be a list of strings"),
        ('{"command": [1]}', "'command' must be a list of strings"),
        ('{"command": []}', "command cannot be empty"),
        ('{"command": [""]}', "command cannot be empty"),
        ('{"command": ["a\\u0000"]}', "NUL"),
        ('{"command": ["true"], "tty": 1}', "'tty' must be true or false"),
        ('{"command": ["true"], "stdin": "yes"}', "'stdin' must be true or false"),
        ('{"command": ["true"], "env": {"A": "1"}}', "'env' must be a list of strings"),
        ('{"command": ["true"], "env": ["A"]}', "KEY=VALUE"),
        ('{"command": ["true"], "env": ["1A=1"]}', "invalid environment variable name"),
        ('{"command": ["true"], "env": ["A=%s"]}' % ("x" * 32769), "too long"),
        ('{"command": ["true"], "env": [%s"A=1"]}' % ('"A=1",' * 64), "too many"),
        ('{"command": ["true"], "timeout_secs": 0}', "'timeout_secs'"),
        ('{"command": ["true"], "timeout_secs": NaN}', "'timeout_secs'"),
        ('{"command": ["true"], "cwd": ""}', "'cwd'"),
        ('{"command": ["true"], "user": "no-such-user"}', "no-such-user"),
        ('{"command": ["true"], "cwd": "/no/such"}', "/no/such"),
        (b"\x01true", "the first message must be text"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_request_that_can_never_be_is_told_and_the_same_by_post(
    web: Server, message: str | bytes, words: str
) -> None:
    async with web.exec() as run:
        await run.ws.send_message(message)
        output, reply, code = await run.result()
    assert isinstance(reply, ErrorResponse)
    assert (output, reply.code, code) == ({}, "invalid", 1000)
    assert words in reply.error
    if isinstance(message, str):
        assert await web.refused("POST", "/v1/vms/web/exec", message) == (400, "invalid", reply.error)


async def test_a_request_that_does_not_come_is_not_waited_for(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FIRST_MESSAGE_SECS", 0.05)
    async with web.exec() as run:
        _, reply, code = await run.result()
    assert isinstance(reply, ErrorResponse)
    assert (reply.code, code) == ("deadline", 1000)


@pytest.mark.parametrize(("name", "status"), [("nope", 404), ("-x", 400)])
async def test_e_what_can_be_refused_is_refused_before_the_upgrade(web: Server, name: str, status: int) -> None:
    with pytest.raises(ConnectionRejected) as rejected:
        async with web.exec(name):
            pass
    assert rejected.value.status_code == status
    headers = dict(rejected.value.headers or ())
    assert headers[b"x-noid-api-version"] == b"1"
    assert len(headers[b"x-request-id"]) == 8
    assert rejected.value.body is not None
    assert b'"code"' in rejected.value.body


async def test_an_exec_that_is_no_websocket_is_426(web: Server) -> None:
    answer = await web.ask("GET", "/v1/vms/web/exec")
    assert (answer.status, answer.headers["upgrade"]) == (426, "websocket")
    assert "WebSocket" in answer.json()["error"]


async def test_the_upgrade_is_what_clients_of_the_predecessor_demand(web: Server) -> None:
    client = await web.unix()
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    await client.send("GET", "/v1/vms/web/exec", headers=upgrade | {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="})
    lines = (await client.stream.receive_some()).decode().lower().split("\r\n")
    assert lines[0].startswith("http/1.1 101")
    assert "connection: upgrade" in lines
    assert "upgrade: websocket" in lines
    assert "x-noid-api-version: 1" in lines
    assert not [line for line in lines if line.startswith(("sec-websocket-extensions", "sec-websocket-protocol"))]


async def test_a_vm_that_is_off_is_told_as_a_conflict(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("poweroff")
        await run.result()
    while (await web.ask("GET", "/v1/vms/web")).json()["state"] == "running":  # noqa: ASYNC110  # in another process
        await trio.sleep(0.01)
    async with web.exec() as run:
        await run.ask("true")
        _, reply, code = await run.result()
    assert isinstance(reply, ErrorResponse)
    assert (reply.code, code) == ("conflict", 1000)
    assert (await web.refused("POST", "/v1/vms/web/exec", {"command": ["true"]}))[:2] == (409, "conflict")


async def test_a_vm_that_ends_in_the_middle_is_told(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("sh", "-c", "echo begun; sleep 60")
        await run.until(b"begun\n")
        assert kill_marked(web.config.data_dir)
        _, reply, code = await run.result()
    assert isinstance(reply, ErrorResponse)
    assert (reply.code, code) == ("unavailable", 1000)


async def test_a_guest_that_starts_nothing_is_not_waited_for(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "START_SECS", 0.05)
    web.faults.arm("start", hang)
    async with web.exec() as run:
        await run.ask("true")
        _, reply, _ = await run.result()
    assert isinstance(reply, ErrorResponse)
    assert reply.code == "unavailable"
    assert "The VM still runs" in reply.error
    assert (await web.run("true"))["exit_code"] == 0


async def test_e_a_bug_is_1011_and_keeps_its_secrets(web: Server) -> None:
    web.faults.arm("start", fail(RuntimeError("a secret")))
    async with web.exec() as run:
        await run.ask("true")
        _, reply, code = await run.result()
    assert isinstance(reply, ErrorResponse)
    assert (reply.code, code) == ("internal", 1011)
    assert "secret" not in reply.error


async def test_d_a_server_that_stops_says_so_and_the_vm_runs_on(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("sh", "-c", "echo begun; sleep 60")
        await run.until(b"begun\n")
        web.stopping.set()
        _, reply, code = await run.result()
    assert isinstance(reply, ErrorResponse)
    assert (reply.code, code) == ("unavailable", 1012)
    await web.stopped.wait()
    user = web.agent.local_user()
    assert web.agent.vm(user, "web").state == "running"
    async with web.agent.guests.reach(user, "web") as guest:
        assert await guest.ping() >= 0


@pytest.mark.parametrize("how", ["close", "vanish"])
@pytest.mark.deadline(20)
async def test_a_client_that_leaves_ends_its_process(web: Server, how: str) -> None:
    async with web.exec() as run:
        await run.ask("sh", "-c", f"echo begun; count {COUNTER}")
        await run.until(b"begun\n")
        if how == "vanish":
            await run.ws._stream.aclose()
    await ticks_no_more(web)


@pytest.mark.deadline(20)
async def test_a_client_that_leaves_its_input_unread_ends_its_process(
    web: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websockets, "GONE_CHECK_SECS", 0.05)
    async with web.exec() as run:
        await run.ask("sh", "-c", f"echo begun; count {COUNTER}", stdin=True)
        await run.until(b"begun\n")
        with trio.move_on_after(0.3):
            while True:
                await run.feed(bytes(60_000))
        await run.ws._stream.aclose()
    await ticks_no_more(web)


@pytest.mark.deadline(20)
async def test_j_a_flood_of_input_is_not_taken_in(web: Server) -> None:
    sent = 0
    async with web.exec() as run:
        await run.ask("sh", "-c", "echo begun; sleep 60", stdin=True)
        await run.until(b"begun\n")
        with trio.move_on_after(1):
            while True:
                await run.feed(bytes(1_000_000))
                sent += 1
        await run.ws._stream.aclose()
    assert sent < 16, "a process that reads nothing was sent this many megabytes"


@pytest.mark.deadline(20)
async def test_b_a_client_that_reads_nothing_holds_up_nobody(web: Server) -> None:
    async with web.exec() as deaf:
        await deaf.ask("yes")
        await deaf.next()  # and nothing more
        for _ in range(3):
            assert (await web.run("echo", "heard"))["stdout"] == "heard\n"
        async with web.exec() as other:
            await other.ask("echo", "heard")
            assert (await other.result())[0] == {STDOUT: b"heard\n"}


async def test_two_clients_at_once_each_get_their_own(web: Server) -> None:
    async with web.exec() as one, web.exec() as two:
        await one.ask("cat", stdin=True)
        await two.ask("cat", stdin=True)
        for word in (b"a", b"b", b"c"):
            await one.feed(b"1" + word)
            await two.feed(b"2" + word)
            await one.until(b"1" + word)
            await two.until(b"2" + word)
        await two.feed(b"")
        assert (await two.result())[1] == DONE
        await one.feed(b"still here")
        await one.until(b"still here")


@pytest.mark.parametrize("server", [{"max_ws_sessions": 2}], indirect=True)
async def test_one_session_more_than_allowed_is_503_until_one_ends(web: Server) -> None:
    async with web.exec() as one, web.exec() as two:
        await two.ask("cat", stdin=True)
        with pytest.raises(ConnectionRejected) as rejected:
            async with web.exec():
                pass
        assert rejected.value.status_code == 503
        assert b"max_ws_sessions" in (rejected.value.body or b"")
        await one.ask("true")
        await one.result()
        async with web.exec() as three:
            await three.ask("true")
            assert (await three.result())[1] == DONE


async def test_a_stream_of_input_frames_before_the_request_is_no_request(web: Server) -> None:
    async with web.exec() as run:
        await run.ws.send_message(bytes((STDIN,)))
        assert isinstance((await run.result())[1], ErrorResponse)


# --- POST ------------------------------------------------------------------------------------------------------------


async def test_post_answers_with_everything_in_the_order_it_came(web: Server) -> None:
    assert await web.run("sh", "-c", "echo out; echo err >&2; echo out; exit 42") == {
        "stdout": "out\nerr\nout\n",
        "exit_code": 42,
        "timed_out": False,
        "truncated": False,
        "signal": None,
    }


async def test_post_has_no_input_whatever_it_says(web: Server) -> None:
    assert (await web.run("cat", stdin=True))["exit_code"] == 0


@pytest.mark.parametrize("server", [{"exec_timeout_secs": 0.3}], indirect=True)
@pytest.mark.parametrize("fields", [{}, {"timeout_secs": 60}])
@pytest.mark.deadline(20)
async def test_post_ends_a_command_at_the_servers_limit_and_keeps_what_it_wrote(
    web: Server, fields: dict[str, Any]
) -> None:
    done = await web.run("sh", "-c", f"echo begun; count {COUNTER}", **fields)
    assert (done["stdout"], done["exit_code"], done["timed_out"]) == ("begun\n", None, True)
    await ticks_no_more(web)


async def test_post_ends_a_command_at_the_requests_own_limit(web: Server) -> None:
    assert (await web.run("sleep", "60", timeout_secs=0.1))["timed_out"] is True


@contextlib.asynccontextmanager
async def _file_of(web: Server, text: str) -> AsyncIterator[str]:
    async with web.exec() as run:
        await run.ask("sh", "-c", "tee /dev/shm/text > /dev/null", stdin=True)
        data = text.encode()
        for at in range(0, len(data), 500_000):
            await run.feed(data[at : at + 500_000])
        await run.feed(b"")
        assert (await run.result())[1] == DONE
    yield "/dev/shm/text"


@pytest.mark.parametrize("head", ["", "x", "xy", "xyz"])
async def test_post_cuts_a_long_output_between_characters(web: Server, head: str) -> None:
    async with _file_of(web, head + "€" * 200_000) as path:
        done = await web.run("cat", path, path)
    text = done["stdout"]
    assert (done["truncated"], done["exit_code"], "\ufffd" in text) == (True, 0, False)
    assert (1 << 20) - 3 < len(text.encode()) <= 1 << 20
    assert text.startswith(head + "€")


async def test_post_keeps_an_output_of_just_the_limit_whole(web: Server) -> None:
    async with _file_of(web, "é" * (1 << 18)) as path:
        done = await web.run("cat", path, path)
    assert (done["truncated"], len(done["stdout"])) == (False, 1 << 19)


async def test_post_shows_bytes_that_are_no_text(web: Server) -> None:
    async with web.exec() as run:
        await run.ask("tee", "/dev/shm/bytes", stdin=True)
        await run.feed(b"a\xff\xc3(\xe2\x82")
        await run.feed(b"")
        await run.result()
    assert (await web.run("cat", "/dev/shm/bytes"))["stdout"] == "a\ufffd\ufffd(\ufffd"


@pytest.mark.deadline(20)
async def test_post_of_a_client_that_leaves_ends_its_process(web: Server) -> None:
    client = await web.unix()
    await client.send("POST", "/v1/vms/web/exec", {"command": ["count", COUNTER]})
    while (await web.run("cat", COUNTER))["exit_code"] != 0:  # noqa: ASYNC110  # in the guest
        await trio.sleep(0.01)
    await client.stream.aclose()
    await ticks_no_more(web)


async def test_post_of_a_flood_is_bounded(web: Server) -> None:
    done = await web.run("yes", timeout_secs=1.5)
    assert (done["timed_out"], done["truncated"], len(done["stdout"])) == (True, True, 1 << 20)


async def test_arguments_arrive_as_the_bytes_they_were(web: Server) -> None:
    body = b'{"command": ["echo", "\\udcff", "a\\nb", ""]}'
    done = (await web.ask("POST", "/v1/vms/web/exec", body)).json()
    assert (done["stdout"], done["exit_code"]) == ("\ufffd a\nb \n", 0)


async def test_exec_works_over_tcp_with_a_token(server: Server) -> None:
    token = await server.add_user("alice")
    await server.create("web", token=token)
    async with server.exec("web", token=token) as run:
        await run.ask("hostname")
        assert await run.result() == ({STDOUT: b"web\n"}, DONE, 1000)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer noid_tok_wrong"}, {"authorization": "Basic x"}])
async def test_e_nobody_is_refused_before_the_upgrade(server: Server, headers: dict[str, str]) -> None:
    with pytest.raises(ConnectionRejected) as rejected:
        async with open_ws(await server._tcp_stream(), "/v1/vms/web/exec", headers):
            pass
    assert rejected.value.status_code == 401
