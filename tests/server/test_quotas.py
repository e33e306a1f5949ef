"""Quotas: what is over them is refused before anything is made, also when two come at once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from noid import hostextents, hostfs
from noid.core.config.settings import LimitsConfig, QuotaConfig

Server = Any  # see conftest.py
SHAPE = {"cpus": 1, "mem_mib": 128}
MIB = 1 << 20


def quota(**limits: int) -> dict[str, Any]:
    return {"quota": QuotaConfig(**limits)}


def limited(*values: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("server", values, indirect=True)


async def refused(server: Server, path: str, body: Any = None) -> str:
    """Return the text of a refusal for the quota's sake."""
    status, code, text = await server.refused("POST", path, body)
    assert (status, code) == (403, "quota")
    return str(text)


@limited(quota(vms=1), quota(vcpus=1), quota(mem_mib=200))
async def test_a_vm_over_the_quota_is_not_made(server: Server) -> None:
    await server.create("one")
    assert "ask for a higher quota" in await refused(server, "/v1/vms", {"name": "two", **SHAPE})
    assert [vm["name"] for vm in (await server.ask("GET", "/v1/vms")).json()] == ["one"]
    await server.create("one", token=await server.add_user("alice"))
    await server.ask("DELETE", "/v1/vms/one")
    await server.create("two")


@limited(quota(vms=3))
async def test_of_many_that_come_at_once_no_more_are_made_than_fit(server: Server) -> None:
    statuses: list[int] = []

    async def create(name: str) -> None:
        statuses.append((await server.ask("POST", "/v1/vms", {"name": name, **SHAPE})).status)

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(create, f"vm{number}")
    assert sorted(statuses) == [201] * 3 + [403] * 3
    assert len((await server.ask("GET", "/v1/vms")).json()) == 3


@limited(quota(checkpoints=2))
async def test_of_checkpoints_too_no_more_are_made_than_fit(server: Server) -> None:
    statuses: list[int] = []
    for number in range(4):
        await server.create(f"vm{number}")

    async def checkpoint(name: str) -> None:
        statuses.append((await server.ask("POST", f"/v1/vms/{name}/checkpoints")).status)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(checkpoint, f"vm{number}")
    assert sorted(statuses) == [201] * 2 + [403] * 2
    assert "your quota of checkpoints is 2" in await refused(server, "/v1/vms/vm0/checkpoints")
    assert (await server.ask("GET", "/v1/quota")).json()["use"]["checkpoints"] == 2


@limited(quota(vms=1))
async def test_a_clone_counts_and_a_restore_in_place_does_not(server: Server) -> None:
    await server.create("web")
    made = (await server.ask("POST", "/v1/vms/web/checkpoints")).json()["id"]
    await refused(server, "/v1/vms/web/restore", {"checkpoint_id": made, "new_name": "copy"})
    assert (await server.ask("POST", "/v1/vms/web/restore", {"checkpoint_id": made})).status == 200


@limited(quota(bytes=10_000))
async def test_who_fills_the_disk_makes_nothing_more(server: Server) -> None:
    await server.create("web")  # nothing was there before
    assert "your quota of bytes on disk is 10000" in await refused(server, "/v1/vms", {"name": "two", **SHAPE})
    await refused(server, "/v1/vms/web/checkpoints")
    assert (await server.run("echo", "still here"))["stdout"] == "still here\n"


@limited(quota(exec_sessions=1))
async def test_no_more_processes_run_than_may(server: Server) -> None:
    await server.create("web")
    made = await server.ask("POST", "/v1/vms/web/processes", {"command": ["sleep", "60"]})
    assert made.status == 201
    await refused(server, "/v1/vms/web/exec", {"command": ["true"]})
    assert (await server.ask("GET", "/v1/quota")).json()["use"]["exec_sessions"] == 1
    await server.ask("DELETE", f"/v1/vms/web/processes/{made.json()['id']}")
    assert (await server.run("true"))["exit_code"] == 0


@limited(quota(exec_sessions=1))
async def test_what_a_guest_has_not_told_yet_counts_before_another_process_starts(server: Server) -> None:
    for name in ("web", "db"):
        await server.create(name)
    vm = server.agent.vm(server.agent.local_user(), "db")
    untold = await server.agent.guests._sessions.of(vm)
    await untold.all()  # it has told, and is made to look as after a start of the agent
    untold._known = trio.Event()
    statuses: list[int] = []

    async def start(name: str) -> None:
        answer = await server.ask("POST", f"/v1/vms/{name}/processes", {"command": ["sleep", "60"]})
        statuses.append(answer.status)

    async with trio.open_nursery() as nursery:
        for name in ("web", "db", "db"):
            nursery.start_soon(start, name)
        await trio.sleep(0.3)
        assert statuses == []
        untold._known.set()
    assert sorted(statuses) == [201, 403, 403]


@limited(quota(vms=1, mem_mib=4096))
async def test_a_user_s_own_quota_counts_at_once_and_can_be_taken_back(server: Server) -> None:
    user, quotas = server.agent.local_user(), server.agent.services.quotas
    await quotas.set_limits(user, {"vms": None, "vcpus": 2}, frozenset())
    await server.create("one")
    await server.create("two")
    assert "your quota of vCPUs is 2" in await refused(server, "/v1/vms", {"name": "three", **SHAPE})
    answer = (await server.ask("GET", "/v1/quota")).json()
    assert answer["limits"] == {
        "vms": None, "vcpus": 2, "mem_mib": 4096, "checkpoints": None, "bytes": None, "exec_sessions": None,
    }  # fmt: skip
    used = answer["use"]
    assert used.pop("bytes") > 0
    assert used == {"vms": 2, "vcpus": 2, "mem_mib": 256, "checkpoints": 0, "exec_sessions": 0}
    await quotas.set_limits(user, {}, frozenset({"vms", "vcpus"}))
    assert "your quota of VMs is 1" in await refused(server, "/v1/vms", {"name": "three", **SHAPE})


@limited({"limits": LimitsConfig(max_vms=1, max_memory_per_vm=200)})
async def test_the_host_has_limits_for_all_together(server: Server) -> None:
    token = await server.add_user("alice")
    await server.create("one")
    status, code, text = await server.refused("POST", "/v1/vms", {"name": "x", **SHAPE}, token=token)
    assert (status, code, "this host has 1 VMs" in text) == (403, "quota", True)
    status, code, _ = await server.refused("POST", "/v1/vms", {"name": "x", "cpus": 1, "mem_mib": 201}, token=token)
    assert (status, code) == (400, "invalid")


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_what_files_share_counts_once_and_what_others_have_too_not_at_all(tmp_path: Path) -> None:
    mine, links, everybody = tmp_path / "mine", tmp_path / "links", tmp_path / "everybody"
    for directory in (mine, links, everybody):
        directory.mkdir()
    for path in (mine / "a", everybody / "b"):
        path.write_bytes(b"x" * MIB)
        hostfs.fsync_tree(path.parent)
    (links / "again").hardlink_to(mine / "a")
    (links / "theirs").hardlink_to(everybody / "b")
    with (mine / "sparse").open("wb") as sparse:
        sparse.truncate(64 * MIB)
    own = [mine / "a", mine / "sparse", links / "again", links / "theirs", mine / "gone"]
    assert hostextents.occupied_bytes(own, [everybody / "b"]) == MIB
    assert hostextents.occupied_bytes(own) == 2 * MIB
    assert hostextents.occupied_bytes([]) == 0


def test_blocks_that_files_share_count_once(tmp_path: Path) -> None:
    if not hostfs.reflink_works(tmp_path):
        pytest.skip("the file system of the temporary directory shares no blocks between files")
    (tmp_path / "a").write_bytes(b"x" * MIB)
    hostfs.fsync_tree(tmp_path)
    hostfs.reflink(tmp_path / "a", tmp_path / "b")
    assert hostextents.occupied_bytes([tmp_path / "a", tmp_path / "b"]) == MIB


async def test_what_a_user_occupies_is_measured_once_for_all_who_ask_at_the_same_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, measured = threading.Event(), 0

    def occupied(own: object, everybody: object) -> int:
        nonlocal measured
        measured += 1
        go_on.wait(10)
        return 7

    async def ask(token: str) -> None:
        assert (await server.ask("GET", "/v1/quota", token=token)).json()["use"]["bytes"] == 7

    monkeypatch.setattr("noid.core.people.quotas._occupied", occupied)
    tokens = [await server.add_user(name) for name in ("alice", "bob")]
    async with trio.open_nursery() as nursery:
        for token in tokens * 4:
            nursery.start_soon(ask, token)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert measured == 1  # bob waits for alice
        go_on.set()
    assert measured == 2
