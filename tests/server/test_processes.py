"""Processes that outlive their clients: started, listed, attached to, waited for, signalled, ended; and lineages."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from noid.core import wire
from noid.testing.raw_http import open_ws

from .conftest import Exec, Server

BASE = "/v1/vms/web/processes"


async def detached(server: Server, *argv: str) -> dict[str, Any]:
    answer = await server.ask("POST", BASE, {"command": list(argv)})
    assert answer.status == 201, answer.body
    return dict(answer.json())


async def attached(server: Server, path: str) -> tuple[dict[int, bytes], Any, wire.Started | None]:
    stream = await trio.open_unix_socket(str(server.config.socket_path))
    async with open_ws(stream, path, {}) as ws:
        run = Exec(ws)
        output, reply, _ = await run.result()
    return output, reply, run.started


async def test_a_process_without_a_client_runs_on_and_tells_its_end(web: Server) -> None:
    started = await detached(web, "sh", "-c", "echo begun; sleep 0.2; echo done; exit 3")
    waited = (await web.ask("GET", f"{BASE}/{started['id']}/wait?timeout_secs=10")).json()
    assert (waited["state"], waited["exit_code"], waited["origin"]) == ("exited", 3, "native")
    assert [p["id"] for p in (await web.ask("GET", BASE)).json()] == [started["id"]]

    output, reply, hello = await attached(web, f"{BASE}/{started['id']}/attach?offset=0")

    assert (output, reply) == ({1: b"begun\ndone\n"}, wire.ExecResult(exit_code=3))
    assert hello is not None
    assert (hello.process, hello.offset) == (started["id"], 0)
    assert (await attached(web, f"{BASE}/{started['id']}/attach?offset=6"))[0] == {1: b"done\n"}
    assert (await web.ask("GET", f"/v1/vms/web/logs/{started['id']}")).body == b"begun\ndone\n"


async def test_a_signal_reaches_a_process_and_delete_forgets_it(web: Server) -> None:
    started = await detached(web, "sleep", "1000")
    path = f"{BASE}/{started['id']}"
    assert (await web.ask("POST", f"{path}/signal", {"signal": "INT"})).status == 204
    assert (await web.ask("GET", f"{path}/wait")).json()["signal"] == 2
    assert (await web.refused("POST", f"{path}/signal", {"signal": "NONE"}))[:2] == (400, "invalid")
    assert (await web.ask("DELETE", path)).status == 204
    assert (await web.refused("GET", path))[:2] == (404, "not_found")


@pytest.mark.parametrize("server", [{"exec_reattach_secs": 30.0}], indirect=True)
async def test_a_client_that_was_lost_goes_on_where_it_was_and_one_that_leaves_ends_its_process(web: Server) -> None:
    async with web.exec() as run:
        await run.ws.send_message('{"command": ["sh", "-c", "echo one; sleep 0.5; echo two"], "resume": true}')
        await run.until(b"one\n")
        assert run.started is not None
        lost = run.started
        await run.ws._stream.aclose()
    path = f"{BASE}/{lost.process}/attach?offset=4&lineage={lost.lineage}&resume=1"
    assert (await attached(web, path))[:2] == ({1: b"two\n"}, wire.ExecResult(exit_code=0))

    async with web.exec() as run:
        await run.ws.send_message('{"command": ["sh", "-c", "echo one; sleep 60"], "resume": true}')
        await run.until(b"one\n")
        await run.ws.aclose()
    with trio.fail_after(20):
        while [p for p in (await web.ask("GET", BASE)).json() if p["state"] == "running"]:  # noqa: ASYNC110  # over HTTP
            await trio.sleep(0.02)


async def test_after_a_restore_in_place_clients_hear_of_it_and_the_copy_is_another_lineage(web: Server) -> None:
    started = await detached(web, "sh", "-c", "echo begun; sleep 1000")
    checkpoint = (await web.ask("POST", "/v1/vms/web/checkpoints", {})).json()["id"]
    replies: list[Any] = []

    async def watch(*, task_status: trio.TaskStatus[None]) -> None:
        stream = await trio.open_unix_socket(str(web.config.socket_path))
        async with open_ws(stream, f"{BASE}/{started['id']}/attach", {}) as ws:
            run = Exec(ws)
            await run.until(b"begun\n")
            task_status.started()
            replies.append((await run.result())[1])

    async with trio.open_nursery() as nursery:
        await nursery.start(watch)
        assert (await web.ask("POST", "/v1/vms/web/restore", {"checkpoint_id": checkpoint})).status == 200

    assert [reply.code for reply in replies] == ["lineage"]
    (copy,) = (await web.ask("GET", BASE)).json()
    assert (copy["id"], copy["origin"], copy["state"]) == (started["id"], "rewound", "running")
    assert copy["lineage"] != started["lineage"]
    path = f"{BASE}/{started['id']}/attach?lineage={started['lineage']}"
    stream = await trio.open_unix_socket(str(web.config.socket_path))
    with pytest.raises(Exception, match="409"):
        async with open_ws(stream, path, {}):
            pass
    answer = await web.ask("POST", "/v1/vms/web/restore", {"checkpoint_id": checkpoint, "new_name": "copy"})
    assert answer.status == 200
    assert [p["origin"] for p in (await web.ask("GET", "/v1/vms/copy/processes")).json()] == ["forked-copy"]


async def test_what_a_process_wrote_can_be_read_after_its_machine_has_died(web: Server) -> None:
    started = await detached(web, "sh", "-c", "echo last words; sleep 0.3; poweroff; sleep 60")
    waited = (await web.ask("GET", f"{BASE}/{started['id']}/wait?timeout_secs=20")).json()
    assert waited["state"] == "lost"
    stream = await trio.open_unix_socket(str(web.config.socket_path))
    async with open_ws(stream, f"{BASE}/{started['id']}/attach", {}) as ws:
        output, reply, _ = await Exec(ws).result()
    assert output == {1: b"last words\n"}
    assert isinstance(reply, wire.ErrorResponse)


@pytest.mark.parametrize("server", [{"exec_reattach_secs": 30.0}], indirect=True)
async def test_a_client_that_comes_back_is_told_how_much_input_arrived_and_what_it_sent_before_is_dropped(
    web: Server,
) -> None:
    command = '{"command": ["sh", "-c", "sleep 1; cat"], "resume": true, "stdin": true}'  # reads nothing at first
    async with web.exec() as run, trio.open_nursery() as nursery:
        await run.ws.send_message(command)
        lost = wire.reply_from_json(await run.ws.get_message())
        assert isinstance(lost, wire.Started)
        assert lost.stdin == 0
        for _ in range(6):  # more than the process' buffer takes: the rest waits in the server
            nursery.start_soon(run.feed, b"x" * 60_000)
        session = await (await web.agent.guests.sessions(web.agent.local_user(), "web")).get(lost.process)
        with trio.fail_after(10):
            while session.process is None or session.process.stdin_taken < 60_001:  # noqa: ASYNC110  # over a socket
                await trio.sleep(0.01)
        path = f"{BASE}/{lost.process}/attach?offset=0&lineage={lost.lineage}&resume=1"
        stream = await trio.open_unix_socket(str(web.config.socket_path))
        async with open_ws(stream, path, {}) as ws:  # the first connection is still there: nobody has noticed
            again = Exec(ws)
            attached_again = wire.reply_from_json(await ws.get_message())
            assert isinstance(attached_again, wire.Started)
            arrived = attached_again.stdin
            assert arrived is not None
            assert 0 < arrived < 360_000
            await again.feed(b"y" * 60_000)
            await again.feed(b"")
            output, reply, _ = await again.result()
        nursery.cancel_scope.cancel()
    assert reply == wire.ExecResult(exit_code=0)
    assert output[1] == b"x" * arrived + b"y" * 60_000
