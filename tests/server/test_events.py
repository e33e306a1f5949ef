"""Server-sent events and waiting for a VM to change: nothing is missed unnoticed, and nobody sees what is another's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing

from noid.core import events
from noid.server import events as streams

Server = Any  # see conftest.py


@dataclass(frozen=True)
class Sent:
    kind: str
    id: str
    data: dict[str, Any]


def parsed(text: str) -> list[Sent]:
    """Read *text* as the HTML standard says a stream of events is read."""
    found = []
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.splitlines():
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        if "data" in fields:  # without, nothing is dispatched
            found.append(Sent(fields["event"], fields["id"], json.loads(fields["data"])))
    return found


async def events_after(server: Server, last: str | None, query: str = "", **kind: Any) -> list[Sent]:
    """Return what happened after the event *last*, without waiting for more."""
    headers = {} if last is None else {"last-event-id": last}
    answer = await server.ask("GET", f"/v1/events?timeout_secs=0{query}", headers=headers, **kind)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
    return parsed(answer.body.decode())


async def position(server: Server, **kind: Any) -> str:
    answer = await server.ask("GET", "/v1/events?timeout_secs=0", **kind)
    (line,) = [line for line in answer.body.decode().splitlines() if line.startswith("id: ")]
    return str(line.removeprefix("id: "))


async def test_everything_that_happens_is_told_in_its_order_once(server: Server) -> None:
    start = await position(server)
    made = (await server.create("web"))["generation"]
    await server.ask("POST", "/v1/vms/web/checkpoints")
    await server.ask("DELETE", "/v1/vms/nothing")
    told = await events_after(server, start)
    assert [each.kind for each in told] == [
        *("operation.start", "vm.create", "operation.end"),
        *("operation.start", "vm.checkpoint", "operation.end"),
    ]
    assert told[1].data["facts"]["generation"] == made
    assert told[1].data["facts"]["operation"] == told[0].data["facts"]["operation"]
    assert told[2].data["facts"]["state"] == "succeeded"
    assert len(told[4].data["facts"]["checkpoint"]) == 16
    assert all(each.data["vm"] == "web" for each in told)
    assert await events_after(server, told[3].id) == told[4:]
    assert await events_after(server, told[-1].id) == []
    assert [each.kind for each in await events_after(server, start, "&kind=vm.create&vm=web")] == ["vm.create"]
    assert await events_after(server, start, "&vm=db") == []


async def test_an_open_stream_tells_at_once_and_ends_with_the_server(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "SILENCE_SECS", 0.05)
    client = await server.unix()
    await client.send("GET", "/v1/events?kind=vm.create")
    seen = b""
    while b": nothing new" not in seen:
        seen += await client.stream.receive_some()
    await server.create("web")
    while b"event: vm.create" not in seen:
        seen += await client.stream.receive_some()
    server.stopping.set()
    with trio.fail_after(5):
        rest = await client.until_closed()
    assert rest.endswith(b"0\r\n\r\n"), "the stream was cut off, not ended"


async def test_who_was_too_slow_or_comes_from_another_agent_hears_of_a_gap(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEPT_EVENTS", 4)
    start = await position(server)
    await server.create("web")
    await server.ask("POST", "/v1/vms/web/checkpoints")
    for last in (start, "another-0", f"{start.partition('-')[0]}-99", "", "x"):
        kinds = [each.kind for each in await events_after(server, last)]
        assert kinds == ["gap", "operation.end", "operation.start", "vm.checkpoint", "operation.end"]


async def test_events_are_their_owners_only(server: Server) -> None:
    token = await server.add_user("eve")
    theirs, mine = await position(server, token=token), await position(server)
    await server.create("web")
    assert await events_after(server, theirs, token=token) == []
    assert len(await events_after(server, mine)) == 3


async def test_a_machine_that_dies_is_told_and_wakes_who_waits_for_a_change(web: Server) -> None:
    start, before = await position(web), (await web.ask("GET", "/v1/vms/web")).json()
    local = web.agent.local_user()
    answers = []

    async def wait() -> None:
        answers.append(await web.ask("GET", f"/v1/vms/web?after={before['generation']}&wait=30"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await web.agent.services.supervisor.get(web.agent.vm(local, "web")).machine.kill()
    assert answers[0].json()["state"] == "dead"
    assert answers[0].json()["generation"] > before["generation"]
    assert [each.kind for each in await events_after(web, start)] == ["vm.died"]


async def test_waiting_for_a_change_ends_with_the_time_or_with_the_vm(web: Server) -> None:
    generation = (await web.ask("GET", "/v1/vms/web")).json()["generation"]
    answer = await web.ask("GET", f"/v1/vms/web?after={generation}&wait=0.01")
    assert (answer.status, answer.json()["generation"]) == (200, generation)
    assert (await web.ask("GET", f"/v1/vms/web?after={generation - 1}&wait=300")).status == 200
    for wrong in ("after=x", "after=-1", "wait=301"):
        assert (await web.refused("GET", f"/v1/vms/web?{wrong}"))[:2] == (400, "invalid")

    async def wait() -> None:
        assert (await web.refused("GET", "/v1/vms/web?after=1000&wait=60"))[:2] == (404, "not_found")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (await web.ask("DELETE", "/v1/vms/web")).status == 204


async def test_long_lists_of_operations_are_told_in_pages(web: Server) -> None:
    for _ in range(4):
        await web.ask("POST", "/v1/vms/web/pause")
        await web.ask("POST", "/v1/vms/web/resume")
    whole = (await web.ask("GET", "/v1/operations?vm=web")).json()
    seen: list[Any] = []
    path = "/v1/operations?vm=web&limit=4"
    while path:
        answer = await web.ask("GET", path)
        seen += answer.json()
        path = answer.headers.get("link", "").partition(">")[0].removeprefix("<")
    assert seen == whole
    assert len(seen) == 9
    assert (await web.refused("GET", "/v1/operations?limit=0"))[:2] == (400, "invalid")
