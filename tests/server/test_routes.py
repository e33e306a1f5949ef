"""Every route: what it answers, and what it refuses with which status, code and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

import noid
from noid.core.model.times import now
from noid.errors import BackendError, DependencyDown, NoSpace
from noid.server import interim
from noid.testing.faults import fail
from noid.testing.raw_http import RawClient

Server = Any  # see conftest.py
SHAPE = {"cpus": 1, "mem_mib": 128}
VM_FIELDS = {
    *("name", "state", "cpus", "mem_mib", "created_at"),  # the predecessor's
    *("id", "generation", "busy", "image", "network", "origin", "receipt"),
    *("ended", "responding", "unresponsive_since", "labels"),
}
CHECKPOINT_FIELDS = {"id", "vm_name", "label", "created_at", "cpus", "mem_mib", "image", "parent", "labels"}


async def test_what_needs_no_token(server: Server) -> None:
    client = await server.tcp()
    assert (await client.ask("GET", "/healthz")).json() == {"status": "ok"}
    assert (await client.ask("GET", "/version")).json() == {"version": noid.__version__, "api_version": 1}


async def test_every_path_of_the_older_manuals_leads_to_the_same_place(server: Server) -> None:
    assert (await server.ask("GET", "/health")).json() == {"status": "ok"}
    made = await server.ask("POST", "/vms", {"name": "web", **SHAPE})
    assert made.status == 201
    for path in ("", "/web", "/web/checkpoints", "/web/processes", "/web/logs/console"):
        assert (await server.ask("GET", f"/vms{path}")).body == (await server.ask("GET", f"/v1/vms{path}")).body
    assert (await server.ask("POST", "/vms/web/exec", {"command": ["echo", "hi"]})).json()["stdout"] == "hi\n"
    assert (await server.ask("POST", "/vms/web/checkpoints")).status == 201
    assert (await server.ask("GET", "/logs/web")).body == (await server.ask("GET", "/v1/vms/web/logs/console")).body
    assert (await server.ask("GET", "/console/web")).status == 426
    assert (await server.refused("GET", "/vms/"))[0] == 400
    assert (await server.refused("GET", "/vms/%20"))[0] == 400
    assert (await (await server.tcp()).ask("GET", "/vms")).status == 401
    assert (await server.ask("DELETE", "/vms/web")).status == 204


async def test_who_asks_and_what_to_count_on(server: Server) -> None:
    local = server.agent.local_user()
    assert (await server.ask("GET", "/v1/whoami")).json() == {
        "user_id": local.id,
        "name": local.name,
        "scopes": ["read", "exec", "manage", "admin"],
        "token": None,
    }
    assert (await server.ask("GET", "/v1/capabilities")).json() == {
        "api_version": 1,
        "max_exec_output_bytes": 1048576,
        "exec_timeout_secs": 30,
        "console_timeout_secs": 3600,
        "max_vm_name_length": 64,
        "default_cpus": 1,
        "default_mem_mib": 2048,
    }


async def test_a_vm_from_create_to_destroy(server: Server) -> None:
    made = await server.ask("POST", "/v1/vms", {"name": "web", **SHAPE, "unknown": [1]})
    assert made.status == 201
    assert made.headers["content-type"] == "application/json"
    vm = made.json()
    assert set(vm) == VM_FIELDS | {"timings"}
    assert all(secs >= 0 for secs in vm.pop("timings").values())
    assert (vm["name"], vm["state"], vm["cpus"], vm["mem_mib"], vm["busy"]) == ("web", "running", 1, 128, None)
    assert vm["created_at"][:10] == now().date().isoformat()
    assert {item["name"]: item["status"] for item in vm["receipt"]}["randomness"] == "done"
    assert (vm["responding"], vm["unresponsive_since"], vm["ended"]) == (True, None, None)

    assert (await server.ask("GET", "/v1/vms/web")).json() == vm
    assert (await server.ask("GET", "/v1/vms/web/")).json() == vm
    assert (await server.ask("GET", "/v1/vms?all=1")).json() == [vm]

    gone = await server.ask("DELETE", "/v1/vms/web")
    assert (gone.status, gone.body) == (204, b"")
    assert ";dur=" in gone.headers["server-timing"]
    assert (await server.ask("GET", "/v1/vms")).json() == []


async def test_a_checkpoint_and_what_is_restored_from_it(web: Server) -> None:
    made = await web.ask("POST", "/v1/vms/web/checkpoints", {"label": "cléan"})
    assert made.status == 201
    checkpoint = made.json()
    assert set(checkpoint) == CHECKPOINT_FIELDS | {"timings", "changed_bytes"}
    assert checkpoint["timings"]["pause"] > 0
    assert checkpoint["changed_bytes"] >= 0
    assert (checkpoint["vm_name"], checkpoint["label"], checkpoint["parent"]) == ("web", "cléan", None)

    listed = (await web.ask("GET", "/v1/vms/web/checkpoints")).json()
    assert listed == [{field: checkpoint[field] for field in CHECKPOINT_FIELDS}]

    copy = await web.ask("POST", "/v1/vms/web/restore", {"checkpoint_id": checkpoint["id"], "new_name": "copy"})
    assert (copy.status, copy.json()["name"], copy.json()["origin"]) == (200, "copy", checkpoint["id"])
    again = await web.ask("POST", "/v1/vms/web/restore", {"checkpoint_id": checkpoint["id"], "new_name": None})
    assert (again.status, again.json()["name"], again.json()["origin"]) == (200, "web", checkpoint["id"])
    assert "timings" in again.json()

    await web.ask("DELETE", "/v1/vms/web")
    assert (await web.ask("GET", "/v1/vms/web/checkpoints")).json() == listed


@pytest.mark.parametrize("body", [None, b"", b"  \n", b"{}", b'{"label": null}'])
async def test_a_checkpoint_needs_no_body(web: Server, body: bytes | None) -> None:
    made = await web.ask("POST", "/v1/vms/web/checkpoints", body)
    assert (made.status, made.json()["label"]) == (201, None)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["web"]', "expected a JSON object"),
        (b"{}", "missing field 'name'"),
        (b'{"name": null}', "'name' must be a string"),
        (b'{"name": 7}', "'name' must be a string"),
        (b'{"name": ""}', "VM name is empty"),
        (b'{"name": "a b"}', "invalid characters"),
        (b'{"name": "-a"}', "begins with"),
        (b'{"name": "a..b"}', "'..'"),
        (b'{"name": "a\\n"}', "invalid characters"),
        (b'{"name": "a\\u0000"}', "invalid characters"),
        (b'{"name": "\\ud800"}', "half a surrogate pair"),
        (b'{"name": "%s"}' % (b"x" * 65), "65 characters"),
        (b'{"name": "web", "cpus": "two"}', "'cpus' is \"two\""),
        (b'{"name": "web", "cpus": true}', "'cpus' is true"),
        (b'{"name": "web", "cpus": 1.0}', "'cpus' is 1.0"),
        (b'{"name": "web", "cpus": null}', "'cpus' is null"),
        (b'{"name": "web", "cpus": -1}', "cpus is -1; it must be between"),
        (b'{"name": "web", "cpus": 4294967296}', "cpus is 4294967296; it must be between"),
        (b'{"name": "web", "cpus": 0}', "between 1 and 32"),
        (b'{"name": "web", "cpus": 33}', "between 1 and 32"),
        (b'{"name": "web", "mem_mib": NaN}', "'mem_mib' is NaN"),
        (b'{"name": "web", "mem_mib": 1}', "mem_mib is 1"),
        (b'{"name": "web", "mem_mib": 4294967295}', "mem_mib is 4294967295"),
        (b'{"name": "web", "image": 1}', "'image' must be a string"),
        (b'{"name": "web", "image": "../x"}', "image name"),
        (b'{"name": "web", "mem_mib": %s}' % (b"9" * 5000), "not JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_create_that_can_never_be_is_400_and_makes_nothing(server: Server, body: bytes, words: str) -> None:
    status, code, text = await server.refused("POST", "/v1/vms", body)
    assert (status, code) == (400, "invalid")
    assert words in text
    assert "\n" not in text
    assert (await server.ask("GET", "/v1/vms")).json() == []


async def test_all_64_characters_of_a_name_are_usable(server: Server) -> None:
    name = "_" + "a.B-9" * 12 + "zzz"
    assert len(name) == 64
    await server.create(name)
    assert (await server.run("hostname", name=name))["exit_code"] == 0
    assert (await server.ask("DELETE", f"/v1/vms/{name}")).status == 204


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/vms/{}"),
        ("DELETE", "/v1/vms/{}"),
        ("GET", "/v1/vms/{}/checkpoints"),
        ("POST", "/v1/vms/{}/checkpoints"),
        ("POST", "/v1/vms/{}/restore"),
        ("POST", "/v1/vms/{}/exec"),
    ],
)
async def test_a_bad_name_in_a_path_is_400_an_unknown_one_404(server: Server, method: str, path: str) -> None:
    body = {"command": ["true"], "checkpoint_id": "0123456789abcdef"} if method == "POST" else None
    for bad in ("-x", ".hidden", "a%20b", "a..b", "%ff", "%00", "x" * 65, "%E2%98%83"):
        assert (await server.refused(method, path.format(bad), body))[:2] == (400, "invalid"), bad
    status, code, text = await server.refused(method, path.format("nope"), body)
    assert (status, code) == (404, "not_found")
    assert text.startswith(("VM 'nope' not found", "checkpoint '0123456789abcdef' not found"))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", path) for path in ("/", "/v1", "/v1/nope", "/v1/vms/web/nope", "/v1/vms/web/exec/x", "*")),
        *(("PUT", path) for path in ("/v1/vms", "/v1/vms/web", "/v1/vms/web/exec")),
        *((method, "/v1/vms") for method in ("DELETE", "PATCH", "OPTIONS")),
        ("GET", "/v1/vms/web/restore"),
        ("GET", "/v1/vms/a%2Fb"),
    ],
)
async def test_an_unknown_path_and_a_wrong_method_are_404(server: Server, method: str, path: str) -> None:
    assert await server.refused(method, path) == (404, "not_found", "not found")


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT"])
async def test_a_missing_name_is_400_and_not_the_list(server: Server, method: str) -> None:
    assert await server.refused(method, "/v1/vms/") == (400, "invalid", "missing VM name in path")


async def test_head_answers_without_a_body(server: Server) -> None:
    client = await server.unix()
    await client.send("HEAD", "/v1/vms")
    assert (await client.receive("HEAD")).status == 200
    assert (await client.ask("GET", "/v1/vms")).json() == [], "the connection is out of step"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b"{}", "missing field 'checkpoint_id'"),
        (b'{"checkpoint_id": 1}', "'checkpoint_id' must be a string"),
        (b'{"checkpoint_id": "0", "new_name": 1}', "'new_name' must be a string"),
        (b'{"checkpoint_id": "0", "new_name": ""}', "new VM name is empty"),
        (b'{"checkpoint_id": "0", "new_name": "/"}', "new VM name"),
    ],
)
async def test_a_restore_that_can_never_be_is_400(web: Server, body: bytes, words: str) -> None:
    status, code, text = await web.refused("POST", "/v1/vms/web/restore", body)
    assert (status, code) == (400, "invalid")
    assert words in text


@pytest.mark.parametrize("body", [b"{", b"[]", b'"label"', b'{"label": 1}', b'{"label": "\\ud800"}'])
async def test_a_malformed_checkpoint_is_400_and_makes_nothing(web: Server, body: bytes) -> None:
    assert (await web.refused("POST", "/v1/vms/web/checkpoints", body))[:2] == (400, "invalid")
    assert (await web.ask("GET", "/v1/vms/web/checkpoints")).json() == []


async def test_what_stands_in_the_way_is_409(web: Server) -> None:
    status, code, text = await web.refused("POST", "/v1/vms", {"name": "web", **SHAPE})
    assert (status, code) == (409, "conflict")
    assert "'web' already exists" in text
    made = (await web.ask("POST", "/v1/vms/web/checkpoints")).json()
    restore = {"checkpoint_id": made["id"], "new_name": "web"}
    assert (await web.refused("POST", "/v1/vms/web/restore", restore))[:2] == (409, "conflict")


async def test_an_image_that_is_not_there_is_404(server: Server) -> None:
    status, code, text = await server.refused("POST", "/v1/vms", {"name": "web", **SHAPE, "image": "nope"})
    assert (status, code) == (404, "not_found")
    assert "'nope'" in text


async def test_a_second_operation_on_a_vm_is_409_and_names_the_first(web: Server, nursery: trio.Nursery) -> None:
    go_on = trio.Event()
    web.faults.arm("capture", lambda _: go_on.wait())
    answers = []

    async def checkpoint() -> None:
        answers.append(await web.ask("POST", "/v1/vms/web/checkpoints"))

    async with trio.open_nursery() as waiting:
        waiting.start_soon(checkpoint)
        await web.faults.reached("capture")
        for method, path in (("POST", "/v1/vms/web/checkpoints"), ("DELETE", "/v1/vms/web")):
            status, code, text = await web.refused(method, path)
            assert (status, code) == (409, "busy")
            assert "'web' is busy with checkpoint" in text
        assert (await web.ask("GET", "/v1/vms/web")).json()["busy"] == "checkpoint"
        go_on.set()
    assert answers[0].status == 201


async def test_c_a_client_that_leaves_does_not_stop_its_operation(server: Server) -> None:
    go_on = trio.Event()
    server.faults.arm("launch", lambda _: go_on.wait())
    client = await server.unix()
    await client.send("POST", "/v1/vms", {"name": "web", **SHAPE})
    await server.faults.reached("launch")
    await client.stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    go_on.set()
    user = server.agent.local_user()
    while (vm := server.agent.vm(user, "web")).state != "running" or vm.busy:  # noqa: ASYNC110  # that is the point
        await trio.sleep(0.01)
    assert (await server.run("hostname"))["stdout"] == "web\n"


async def test_a_long_operation_shows_signs_of_life(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interim, "STILL_WORKING_SECS", 0.02)
    go_on = trio.Event()
    server.faults.arm("launch", lambda _: go_on.wait())
    client = await server.unix()
    await client.send("POST", "/v1/vms", {"name": "web", **SHAPE})
    early = await client.stream.receive_some(12)
    assert early == b"HTTP/1.1 100"
    go_on.set()
    rest = RawClient(client.stream)
    rest._connection.receive_data(bytes(early))
    answer = await rest.receive("POST")
    assert (answer.status, answer.json()["name"]) == (201, "web")


@pytest.mark.parametrize("header", ["via", "forwarded", "x-forwarded-for"])
async def test_behind_a_proxy_there_are_no_signs_of_life(
    server: Server, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    monkeypatch.setattr(interim, "STILL_WORKING_SECS", 0.001)
    answer = await server.ask("POST", "/v1/vms", {"name": "web", **SHAPE}, headers={header: "1.1 proxy"})
    assert (answer.status, answer.interim) == (201, 0)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NoSpace("the disk is full. Nothing was changed."), 507, "no_space"),
        (BackendError("the VMM said no"), 500, "backend"),
        (DependencyDown("the VMM is gone"), 503, "unavailable"),
    ],
)
async def test_q_an_error_of_a_backend_has_its_own_status(
    web: Server, error: Exception, status: int, code: str
) -> None:
    web.faults.arm("capture", fail(error))
    got = await web.refused("POST", "/v1/vms/web/checkpoints")
    assert got[:2] == (status, code)
    assert str(error) in got[2]
    assert (await web.ask("GET", "/v1/vms/web")).json()["state"] == "running"


async def test_q_a_bug_is_500_without_its_secrets_and_with_an_id_to_look_up(web: Server) -> None:
    web.faults.arm("capture", fail(RuntimeError("a secret")))
    answer = await web.ask("POST", "/v1/vms/web/checkpoints")
    assert answer.status == 500
    assert answer.json()["code"] == "internal"
    assert answer.headers["x-request-id"] in answer.json()["error"]
    assert b"secret" not in answer.body
    assert (await web.ask("GET", "/v1/vms/web")).json()["state"] == "running"


async def test_directories_of_the_host_are_for_the_local_user_only(server: Server, data_dir: Path) -> None:
    token = await server.add_user("alice")
    text = f"cannot write {data_dir}/storage/x and {server.config.run_dir}/y"
    server.faults.arm("launch", fail(BackendError(text)))
    local = await server.refused("POST", "/v1/vms", {"name": "web", **SHAPE})
    assert text in local[2]
    server.faults.arm("launch", fail(BackendError(text)))
    remote = await server.refused("POST", "/v1/vms", {"name": "web", **SHAPE}, token=token)
    assert "cannot write DATA_DIR/storage/x and RUN_DIR/y" in remote[2]
    assert str(data_dir) not in remote[2]


async def test_k_a_body_over_1_mib_is_413(server: Server) -> None:
    status, code, _ = await server.refused("POST", "/v1/vms", b" " * ((1 << 20) + 1))
    assert (status, code) == (413, "too_large")
    fits = b'{"name":"-"}'.ljust(1 << 20)
    assert (await server.refused("POST", "/v1/vms", fits))[:2] == (400, "invalid")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/healthz", None),
        ("GET", "/v1/vms", None),
        ("GET", "/nope", None),
        ("POST", "/v1/vms", b"{"),
        ("POST", "/v1/vms", bytes(2 << 20)),
        ("GET", "/v1/vms/web/exec", None),
    ],
)
async def test_every_reply_names_the_api_version_and_the_request(
    server: Server, method: str, path: str, body: bytes | None
) -> None:
    for client in (await server.unix(), await server.tcp()):
        answer = await client.ask(method, path, body)
        assert answer.headers["x-noid-api-version"] == "1"
        assert len(answer.headers["x-request-id"]) == 8
