"""What is done to VMs and checkpoints over HTTP: pause and resume, labels and names, checkpoints one by one, lists."""

from __future__ import annotations

import re
from typing import Any

import trio.testing

Server = Any  # see conftest.py


async def test_pause_and_resume_answer_with_the_vm_and_exec_between_them_says_what_to_do(web: Server) -> None:
    for steps in ({"pause"}, set()):
        paused = await web.ask("POST", "/v1/vms/web/pause")
        assert (paused.status, paused.json()["state"], paused.json()["responding"]) == (200, "paused", None)
        assert paused.json()["timings"].keys() == steps
    refused = await web.refused("POST", "/v1/vms/web/exec", {"command": ["true"]})
    assert refused == (409, "conflict", "cannot exec VM 'web': it is paused. Resume it with `noid resume web`.")
    assert (await web.ask("GET", "/v1/vms/web/logs/console")).status == 200
    for _ in range(2):
        resumed = await web.ask("POST", "/v1/vms/web/resume")
        assert (resumed.status, resumed.json()["state"]) == (200, "running")
    assert (await web.run("true"))["exit_code"] == 0
    assert (await web.refused("POST", "/v1/vms/other/pause"))[0] == 404


async def test_names_and_labels_are_patched_and_lists_filtered_by_them(web: Server) -> None:
    made = await web.ask("POST", "/v1/vms", {"name": "db", "mem_mib": 128, "labels": {"tier": "back"}})
    assert (made.status, made.json()["labels"]) == (201, {"tier": "back"})
    patched = await web.ask("PATCH", "/v1/vms/web", {"labels": {"tier": "front", "a/b": "x=y"}})
    assert (patched.status, patched.json()["labels"]) == (200, {"a/b": "x=y", "tier": "front"})
    patched = await web.ask("PATCH", "/v1/vms/web", {"name": "www", "labels": {"a/b": None}})
    assert (patched.json()["name"], patched.json()["labels"]) == ("www", {"tier": "front"})
    assert (await web.ask("PATCH", "/v1/vms/www", {})).json()["timings"] == {}
    assert (await web.refused("GET", "/v1/vms/web"))[0] == 404
    assert (await web.refused("PATCH", "/v1/vms/www", {"name": "db"}))[:2] == (409, "conflict")

    async def names(query: str) -> list[str]:
        return [vm["name"] for vm in (await web.ask("GET", f"/v1/vms?{query}")).json()]

    assert await names("label=tier") == ["www", "db"]
    assert await names("label=tier=back") == ["db"]
    assert await names("label=tier&label=none") == []
    assert await names("state=running&state=dead") == ["www", "db"]
    assert await names("state=stopped") == []


async def test_what_a_list_or_a_label_cannot_be_is_said(server: Server) -> None:
    for path, text in (
        ("/v1/vms?limit=0", "limit is '0'; it must be a whole number from 1 to 1000."),
        ("/v1/vms?limit=1001", "limit is '1001'"),
        ("/v1/vms?cursor=!", "cursor is none that a Link of this list has given"),
        ("/v1/vms?cursor=W10", "cursor is none that a Link of this list has given"),
        ("/v1/checkpoints?cursor=" + "x" * 2000, "cursor is none"),
        ("/v1/vms?cursor=WyJcdWQ4MDAiLCJ4Il0", "cursor is none"),  # half a surrogate pair
        ("/v1/checkpoints?" + "&".join(["label=a"] * 1001), "there are 1001 label= in the query; at most 64"),
        ("/v1/vms?state=asleep", "state is 'asleep'; it must be one of creating, running,"),
        ("/v1/checkpoints?vm=..", "VM name '..' begins with '.'"),
    ):
        status, code, said = await server.refused("GET", path)
        assert (status, code) == (400, "invalid")
        assert said.startswith(text)
    for labels, text in (
        ([], "'labels' must be an object of strings"),
        (None, "'labels' must be an object of strings"),
        ({"a": 1}, "'labels.a' must be a string"),
        ({"a": None}, "'labels.a' must be a string"),
        ({"a\ud800": "x"}, "contains half a surrogate pair"),
        ({"a": "\ud800"}, "contains half a surrogate pair"),
    ):
        status, _, said = await server.refused("POST", "/v1/vms", {"name": "web", "mem_mib": 128, "labels": labels})
        assert status == 400
        assert text in said


async def test_what_is_said_of_a_checkpoint_is_bounded(web: Server) -> None:
    checkpoints = "/v1/vms/web/checkpoints"
    long = {"label": "x" * 4097}
    assert (await web.refused("POST", checkpoints, long))[:2] == (400, "invalid")
    one = f"{checkpoints}/{(await web.ask('POST', checkpoints, {'label': 'x' * 4096})).json()['id']}"
    assert (await web.refused("PATCH", one, long))[:2] == (400, "invalid")
    for patch in ({"x" * 64: None}, {str(n): None for n in range(65)}):
        for path in (one, "/v1/vms/web"):
            assert (await web.refused("PATCH", path, {"labels": patch}))[:2] == (400, "invalid")


async def test_labels_that_are_patched_while_another_patch_is_sent_stay(web: Server) -> None:
    one = f"/v1/vms/web/checkpoints/{(await web.ask('POST', '/v1/vms/web/checkpoints')).json()['id']}"
    slow, body = await web.unix(), b'{"labels":{"slow":""}}'
    head = f"PATCH {one} HTTP/1.1\r\nHost: noid\r\nX-Request-Id: slow\r\nContent-Length: {len(body)}\r\n\r\n"
    await slow.stream.send_all(head.encode() + body[:-1])
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert (await web.ask("PATCH", one, {"labels": {"fast": ""}})).status == 200
    await slow.stream.send_all(body[-1:])
    assert (await slow.receive("PATCH")).json()["labels"] == {"fast": "", "slow": ""}


async def test_checkpoints_one_by_one(web: Server) -> None:
    taken = await web.ask("POST", "/v1/vms/web/checkpoints", {"label": "one", "labels": {"k": "v"}})
    checkpoint = taken.json()
    path = f"/v1/vms/web/checkpoints/{checkpoint['id']}"
    shown = (await web.ask("GET", path)).json()
    assert shown == {key: value for key, value in checkpoint.items() if key in shown}
    changed = await web.ask("PATCH", path, {"label": None, "labels": {"k": None, "l": "w"}})
    assert (changed.status, changed.json()["label"], changed.json()["labels"]) == (200, None, {"l": "w"})
    assert (await web.ask("PATCH", path, {"labels": {}})).json()["label"] is None
    for unknown in (f"/v1/vms/other/checkpoints/{checkpoint['id']}", "/v1/vms/web/checkpoints/0123456789abcdef"):
        for method in ("GET", "PATCH", "DELETE"):
            assert (await web.refused(method, unknown, {} if method == "PATCH" else None))[:2] == (404, "not_found")
    await web.ask("DELETE", "/v1/vms/web")
    assert [c["id"] for c in (await web.ask("GET", "/v1/checkpoints?vm=web&label=l=w")).json()] == [checkpoint["id"]]
    gone = await web.ask("DELETE", path)
    assert (gone.status, gone.body) == (204, b"")
    assert "withdraw;dur=" in gone.headers["server-timing"]
    assert (await web.refused("DELETE", path))[:2] == (404, "not_found")
    assert (await web.ask("GET", "/v1/checkpoints")).json() == []


async def test_a_list_in_pages_is_the_list(web: Server) -> None:
    for command in range(3):
        await web.ask("POST", "/v1/vms/web/checkpoints", {"labels": {"n": str(command)}})
        await web.ask("POST", "/v1/vms/web/processes", {"command": ["true"]})
    await web.create("db")
    for path in ("/v1/vms", "/v1/checkpoints", "/v1/vms/web/checkpoints", "/v1/vms/web/processes", "/v1/vms/web/logs"):
        whole = (await web.ask("GET", path)).json()
        assert len(whole) >= 2
        found: list[Any] = []
        step: str | None = f"{path}?limit=1" + ("&label=n" if "checkpoints" in path else "")
        while step is not None:
            answer = await web.ask("GET", step)
            assert len(answer.json()) == 1
            found += answer.json()
            link = re.fullmatch(r'<(.+)>; rel="next"', answer.headers.get("link", ""))
            step = link[1] if link else None
            assert step is None or ("&label=n" in step) is ("checkpoints" in path)
        assert [thing.get("id") or thing["name"] for thing in found] == [t.get("id") or t["name"] for t in whole]
