"""``Idempotency-Key``: what is repeated is done once and answered alike, whatever crashes in between."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from noid.core.operations import keys
from noid.errors import BackendError
from noid.testing.faults import fail
from noid.testing.raw_http import Answer, RawClient
from noid.testing.simulated_agent import give_default_image

Server = Any  # see conftest.py
NEW = {"name": "new", "cpus": 1, "mem_mib": 128}
KEY = {"idempotency-key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
MORTAL = Path(__file__).with_name("mortal_server.py")


def replayed(answer: Answer) -> bool:
    return answer.headers.get("idempotency-replayed") == "true"


# --- operations ------------------------------------------------------------------------------------------------------


async def test_a_repeated_create_makes_one_vm_and_gets_the_same_answer(server: Server) -> None:
    first, second = [await server.ask("POST", "/v1/vms", NEW, headers=KEY) for _ in range(2)]
    assert (first.status, second.status) == (201, 201)
    assert first.body == second.body
    assert (replayed(first), replayed(second)) == (False, True)
    assert first.headers["x-noid-operation"] == second.headers["x-noid-operation"]
    assert (await server.ask("POST", "/v1/vms", NEW)).status == 409
    gone = {"idempotency-key": "gone"}
    first, second = [await server.ask("DELETE", "/v1/vms/new", headers=gone) for _ in range(2)]
    assert (first.status, first.body, second.status, second.body) == (204, b"", 204, b"")


async def test_a_failure_is_repeated_too_and_what_was_refused_before_it_began_is_not(web: Server) -> None:
    refused = await web.ask("POST", "/v1/vms/later/checkpoints", headers=KEY)
    assert refused.status == 404
    await web.create("later")
    assert (await web.ask("POST", "/v1/vms/later/checkpoints", headers=KEY)).status == 201

    web.faults.arm("capture", fail(BackendError("no luck")))
    other = {"idempotency-key": "other"}
    first, second = [await web.ask("POST", "/v1/vms/web/checkpoints", headers=other) for _ in range(2)]
    assert (first.status, second.status) == (500, 500)
    assert first.body == second.body
    assert replayed(second)
    assert (await web.ask("GET", "/v1/vms/web/checkpoints")).json() == []


async def test_a_key_is_for_one_request_of_one_user(server: Server) -> None:
    token = await server.add_user("eve")
    assert (await server.ask("POST", "/v1/vms", NEW, headers=KEY)).status == 201
    for method, path, body in (
        ("POST", "/v1/vms", NEW | {"name": "other"}),
        ("DELETE", "/v1/vms/new", None),
        ("POST", "/v1/vms?x", NEW),
    ):
        assert (await server.refused(method, path, body, headers=KEY))[:2] == (422, "idempotency")
    theirs = await server.ask("POST", "/v1/vms", NEW, headers=KEY, token=token)
    assert (theirs.status, replayed(theirs)) == (201, False)


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "caf\u00e9"])
async def test_what_is_no_key_is_refused(server: Server, key: str) -> None:
    assert (await server.refused("POST", "/v1/vms", NEW, headers={"idempotency-key": key}))[:2] == (400, "invalid")


async def test_who_asks_while_it_runs_joins_it(web: Server) -> None:
    going_on, answers = trio.Event(), []

    async def wait(_: int | None) -> None:
        await going_on.wait()

    async def ask(**headers: str) -> None:
        answers.append(await web.ask("POST", "/v1/vms/web/checkpoints", headers=KEY | headers))

    web.faults.arm("capture", wait)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await web.faults.reached("capture")
        nursery.start_soon(ask)
        soon = await web.ask("POST", "/v1/vms/web/checkpoints", headers=KEY | {"prefer": "respond-async"})
        assert (soon.status, soon.json()["state"]) == (202, "running")
        assert (await web.refused("POST", "/v1/vms/web/stop", headers=KEY))[0] == 422
        going_on.set()
    assert [answer.status for answer in answers] == [201, 201]
    assert answers[0].body == answers[1].body
    assert len((await web.ask("GET", "/v1/vms/web/checkpoints")).json()) == 1


async def test_who_leaves_at_any_moment_and_asks_again_is_answered_as_if_it_had_stayed(server: Server) -> None:
    """Before the operation is in the journal, its key is held by nobody's request, and by nobody for ever."""
    await server.create("first")  # which makes the template
    for number in range(12):
        body, key = NEW | {"name": f"vm-{number}"}, {"idempotency-key": f"key-{number}"}
        client = await server.unix()
        await client.send("POST", "/v1/vms", body, headers=key)
        await trio.sleep(number * 0.002)
        await client.stream.aclose()
        with trio.fail_after(10):
            answer = await server.ask("POST", "/v1/vms", body, headers=key)
        assert (answer.status, answer.json()["name"]) == (201, f"vm-{number}")


async def test_a_key_is_forgotten_after_a_day(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    await server.ask("POST", "/v1/vms", NEW, headers=KEY)
    later = keys.now() + keys.KEPT
    monkeypatch.setattr(keys, "now", lambda: later)
    assert (await server.refused("DELETE", "/v1/vms/nothing", headers=KEY))[0] == 404


async def test_keys_are_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "KEYS_MAX", 1)
    assert (await server.ask("POST", "/v1/vms", NEW, headers=KEY)).status == 201
    status, code, _ = await server.refused("DELETE", "/v1/vms/new", headers={"idempotency-key": "second"})
    assert (status, code) == (429, "rate_limited")
    assert (await server.ask("POST", "/v1/vms", NEW, headers=KEY)).status == 201
    assert (await server.ask("DELETE", "/v1/vms/new")).status == 204


async def test_the_last_key_there_is_room_for_has_its_answer_too(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "KEYS_MAX", 1)
    body = {"command": ["hostname"]}
    first, second = [await web.ask("POST", "/v1/vms/web/processes", body, headers=KEY) for _ in range(2)]
    assert (first.status, second.status, first.body == second.body) == (201, 201, True)


# --- calls that are no operations ------------------------------------------------------------------------------------


async def test_a_repeated_command_runs_once(web: Server) -> None:
    body = {"command": ["hostname"]}
    first, second = [await web.ask("POST", "/v1/vms/web/processes", body, headers=KEY) for _ in range(2)]
    assert (first.status, second.status) == (201, 201)
    assert first.body == second.body
    assert replayed(second)
    assert len((await web.ask("GET", "/v1/vms/web/processes")).json()) == 1


async def test_a_secret_is_not_kept_to_be_repeated(server: Server) -> None:
    made = await server.ask("POST", "/v1/tokens", {"name": "ci"}, headers=KEY)
    assert made.status == 201
    status, code, text = await server.refused("POST", "/v1/tokens", {"name": "ci"}, headers=KEY)
    assert (status, code) == (409, "conflict")
    assert "answered with 201" in text
    token = made.json()["token"].encode()
    stored = [path for path in server.config.data_dir.glob("noid.db*") if token in path.read_bytes()]
    assert stored == []


async def test_a_call_whose_client_left_is_not_made_again(web: Server) -> None:
    client = await web.unix()
    await client.send("POST", "/v1/vms/web/exec", {"command": ["sleep", "60"]}, headers=KEY)
    while not (await web.ask("GET", "/v1/vms/web/processes")).json():
        await trio.lowlevel.checkpoint()
    await client.stream.aclose()
    status, code, text = await web.refused("POST", "/v1/vms/web/exec", {"command": ["sleep", "60"]}, headers=KEY)
    assert (status, code) == (409, "conflict")
    assert "nobody knows" in text


async def test_a_command_that_began_is_not_run_again_whatever_its_call_was_answered(web: Server) -> None:
    body, answers = {"command": ["sleep", "60"]}, []
    checkpoint = (await web.ask("POST", "/v1/vms/web/checkpoints")).json()["id"]

    async def ask() -> None:
        answers.append(await web.ask("POST", "/v1/vms/web/exec", body, headers=KEY))

    async with trio.open_nursery() as asking:
        asking.start_soon(ask)
        while not (await web.ask("GET", "/v1/vms/web/processes")).json():
            await trio.lowlevel.checkpoint()
        assert (await web.ask("POST", "/v1/vms/web/restore", {"checkpoint_id": checkpoint})).status == 200
    [first] = answers
    assert first.status == 409
    second = await web.ask("POST", "/v1/vms/web/exec", body, headers=KEY)
    assert (second.status, second.body, replayed(second)) == (409, first.body, True)


# --- kill -9 ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def mortal(data_dir: Path, where: str) -> AsyncIterator[RawClient]:
    """Run a server that kills itself where it is told, and talk to it."""
    command = [sys.executable, str(MORTAL), str(data_dir), where]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert (await process.stdout.receive_some()).startswith(b"ready")
        async with await trio.open_unix_socket(str(data_dir / "run" / "agent.sock")) as stream:
            yield RawClient(stream)
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            await process.stdout.aclose()


async def killed(data_dir: Path, where: str, method: str, path: str, body: Any) -> None:
    """Ask a server that dies of it."""
    async with mortal(data_dir, where) as client:
        await client.send(method, path, body, headers=KEY)
        assert await client.until_closed() == b""


@pytest.mark.parametrize(("where", "kept"), [("wake", False), ("after vm.create", True)])
async def test_a_create_whose_agent_was_killed_is_made_once(
    data_dir: Path, no_leaks: None, where: str, kept: bool
) -> None:
    give_default_image(data_dir)
    await killed(data_dir, where, "POST", "/v1/vms", NEW)
    async with mortal(data_dir, "never") as client:
        if kept:
            before = (await client.ask("GET", "/v1/vms/new")).json()["id"]
        answer = await client.ask("POST", "/v1/vms", NEW, headers=KEY)
        assert (answer.status, replayed(answer)) == (201, kept)
        if kept:
            assert answer.json()["id"] == before
        again = await client.ask("POST", "/v1/vms", NEW, headers=KEY)
        assert (again.body, replayed(again)) == (answer.body, True)
        assert [vm["name"] for vm in (await client.ask("GET", "/v1/vms")).json()] == ["new"]
        assert (await client.ask("DELETE", "/v1/vms/new")).status == 204


async def test_a_destroy_whose_agent_was_killed_is_carried_on_and_answered(data_dir: Path, no_leaks: None) -> None:
    give_default_image(data_dir)
    async with mortal(data_dir, "kill:2") as client:  # the first is of the template's machine
        assert (await client.ask("POST", "/v1/vms", NEW)).status == 201
        await client.send("DELETE", "/v1/vms/new", headers=KEY)
        assert await client.until_closed() == b""
    async with mortal(data_dir, "never") as client:
        answer = await client.ask("DELETE", "/v1/vms/new", headers=KEY)
        assert (answer.status, replayed(answer)) == (204, True)
        found = (await client.ask("GET", f"/v1/operations/{answer.headers['x-noid-operation']}")).json()
        assert (found["kind"], found["state"], found["status"]) == ("vm.destroy", "succeeded", 204)
        assert (await client.ask("GET", "/v1/vms")).json() == []


async def test_a_command_whose_agent_was_killed_is_not_run_again(data_dir: Path, no_leaks: None) -> None:
    give_default_image(data_dir)
    body = {"command": ["hostname"]}
    async with mortal(data_dir, "start:2") as client:  # the first tells that the template's guest is ready
        assert (await client.ask("POST", "/v1/vms", NEW)).status == 201
        await client.send("POST", "/v1/vms/new/processes", body, headers=KEY)
        assert await client.until_closed() == b""
    async with mortal(data_dir, "never") as client:
        answer = await client.ask("POST", "/v1/vms/new/processes", body, headers=KEY)
        assert (answer.status, "nobody knows" in answer.json()["error"]) == (409, True)
        assert (await client.ask("GET", "/v1/vms/new/processes")).json() == []
        assert (await client.ask("DELETE", "/v1/vms/new")).status == 204
