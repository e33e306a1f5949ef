"""Operations over HTTP: an id in every reply, answers before the end, looking back, cancelling."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio

from noid.errors import BackendError
from noid.testing.faults import fail

Server = Any  # see conftest.py
NEW = {"name": "new", "cpus": 1, "mem_mib": 128}


async def operation(server: Server, name: str, **query: Any) -> dict[str, Any]:
    """Return the operation as anybody may ask for it."""
    asked = "&".join(f"{key}={value}" for key, value in query.items())
    answer = await server.ask("GET", f"/v1/operations/{name}{'?' if asked else ''}{asked}")
    assert answer.status == 200, answer.body
    return dict(answer.json())


async def test_the_reply_names_an_operation_that_repeats_it(server: Server) -> None:
    made = await server.ask("POST", "/v1/vms", NEW)
    assert made.status == 201
    found = await operation(server, made.headers["x-noid-operation"])
    assert (found["kind"], found["vm"], found["state"], found["error"]) == ("vm.create", "new", "succeeded", None)
    assert (found["status"], found["result"]) == (201, made.json())
    assert found["timings"] == made.json()["timings"]
    assert made.headers["server-timing"].startswith("reserve;dur=")

    taken = await server.ask("POST", "/v1/vms/new/checkpoints")
    found = await operation(server, taken.headers["x-noid-operation"])
    assert (found["status"], found["result"]) == (201, taken.json())
    assert "pause" in found["timings"]

    gone = await server.ask("DELETE", "/v1/vms/new")
    found = await operation(server, gone.headers["x-noid-operation"])
    assert (gone.status, found["status"], found["result"]) == (204, 204, None)
    assert "disk;dur=" in gone.headers["server-timing"]

    all_ = (await server.ask("GET", "/v1/operations?vm=new")).json()
    assert [each["kind"] for each in all_] == ["vm.destroy", "vm.checkpoint", "vm.create"]


async def test_what_failed_says_why_and_where(web: Server) -> None:
    web.faults.arm("capture", fail(BackendError("no luck")))
    refused = await web.ask("POST", "/v1/vms/web/checkpoints")
    assert refused.status == 500
    found = await operation(web, refused.headers["x-noid-operation"])
    assert (found["state"], found["step"], found["status"]) == ("failed", "capture", 500)
    assert found["error"] == refused.json()
    assert found["result"] is None


async def test_who_prefers_it_is_answered_before_the_end(web: Server) -> None:
    async with hung(web, "capture") as go_on:
        begun = await web.ask("POST", "/v1/vms/web/checkpoints", headers={"prefer": "respond-async"})
        assert begun.status == 202
        assert begun.headers["preference-applied"] == "respond-async"
        made = begun.json()["id"]
        assert begun.headers["location"] == f"/v1/operations/{made}"
        assert begun.headers["x-noid-operation"] == made
        assert begun.json()["state"] == "running"
        still = await operation(web, made, wait=0.05)
        assert (still["state"], still["step"], still["status"]) == ("running", "capture", None)
        assert (await web.ask("GET", "/v1/vms/web")).json()["busy"] == "checkpoint"
        go_on()
    done = await operation(web, made, wait=30)
    assert (done["state"], done["status"]) == ("succeeded", 201)
    listed = (await web.ask("GET", "/v1/vms/web/checkpoints")).json()
    assert [each["id"] for each in listed] == [done["result"]["id"]]


async def test_what_is_done_while_the_client_is_ready_to_wait_is_answered_as_ever(web: Server) -> None:
    answer = await web.ask("POST", "/v1/vms/web/checkpoints", headers={"prefer": "Respond-Async; x=1, wait=30"})
    assert answer.status == 201
    assert "preference-applied" not in answer.headers


@pytest.mark.parametrize("prefer", ["respond-async", "respond-async, wait=5", "wait=x, respond-async"])
async def test_what_is_refused_before_it_begins_is_refused_at_once(web: Server, prefer: str) -> None:
    answer = await web.ask("POST", "/v1/vms", {"name": "-"}, headers={"prefer": prefer})
    assert answer.status == 400
    answer = await web.ask("POST", "/v1/vms/nobody/checkpoints", headers={"prefer": prefer})
    assert answer.status == 404
    assert "x-noid-operation" not in answer.headers


async def test_a_cancelled_operation_leaves_nothing_and_says_so_to_who_waits(server: Server) -> None:
    heard = []

    async def wait() -> None:
        heard.append(await server.ask("POST", "/v1/vms", NEW))

    async with hung(server, "launch"), trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        made = await first_operation(server, "launch")
        cancelled = await server.ask("POST", f"/v1/operations/{made}/cancel")
        assert cancelled.status == 202
    assert (heard[0].status, heard[0].json()["code"]) == (409, "cancelled")
    found = await operation(server, made)
    assert (found["state"], found["status"], found["error"]["code"]) == ("cancelled", 409, "cancelled")
    assert (await server.ask("GET", "/v1/vms")).json() == []
    assert (await server.refused("POST", f"/v1/operations/{made}/cancel"))[:2] == (409, "conflict")
    assert (await server.create("new"))["state"] == "running"


async def test_a_destroy_cannot_be_cancelled(web: Server) -> None:
    async with hung(web, "kill") as go_on:
        begun = await web.ask("DELETE", "/v1/vms/web", headers={"prefer": "respond-async"})
        assert begun.status == 202
        status, code, text = await web.refused("POST", f"/v1/operations/{begun.json()['id']}/cancel")
        assert (status, code) == (409, "conflict")
        assert "cannot be cancelled" in text
        go_on()
    assert (await operation(web, begun.json()["id"], wait=30))["status"] == 204


async def test_an_operation_is_its_owners_only(web: Server) -> None:
    token = await web.add_user("eve")
    made = (await web.ask("POST", "/v1/vms/web/checkpoints")).headers["x-noid-operation"]
    for method, path in (("GET", f"/v1/operations/{made}"), ("POST", f"/v1/operations/{made}/cancel")):
        foreign = await web.refused(method, path, token=token)
        unknown = await web.refused(method, path.replace(made, "nothing"), token=token)
        assert foreign[:2] == unknown[:2] == (404, "not_found")
    assert (await web.ask("GET", "/v1/operations", token=token)).json() == []


# --- how these tests hold an operation up ----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def hung(server: Server, call: str) -> AsyncIterator[Callable[[], None]]:
    """Let *call* of the VMM wait until the function that is yielded is called, at the latest until the block ends."""
    going_on = trio.Event()

    async def wait(_: int | None) -> None:
        await going_on.wait()

    server.faults.arm(call, wait)
    try:
        yield going_on.set
    finally:
        going_on.set()


async def first_operation(server: Server, call: str) -> str:
    """Return the id of the newest operation once it hangs in *call*."""
    await server.faults.reached(call)
    return str((await server.ask("GET", "/v1/operations")).json()[0]["id"])


async def test_operations_come_in_pages_also_to_who_asks_for_all(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noid.server.operations.LIMIT_MAX", 1)
    await web.ask("POST", "/v1/vms/web/pause")
    page = await web.ask("GET", "/v1/operations")
    assert [each["kind"] for each in page.json()] == ["vm.pause"]
    rest = await web.ask("GET", page.headers["link"].partition(">")[0].removeprefix("<"))
    assert [each["kind"] for each in rest.json()] == ["vm.create"]
    assert "link" not in rest.headers
