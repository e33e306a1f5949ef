"""Which checkpoint is meant by an id, the beginning of one, or a label; and what is asked to find out."""

from __future__ import annotations

import json
from typing import Any

import pytest

VM = {"name": "web", "state": "running", "cpus": 1, "mem_mib": 512, "created_at": "2026-01-02 03:04:05"}
FULL = "0123456789abcdef"


def taken(id_: str, vm: str = "web", label: str | None = None) -> dict[str, Any]:
    return {"id": id_, "vm_name": vm, "label": label, "created_at": "2026-01-02 03:04:05"}


WEBS = [
    taken(FULL, label="golden"),
    taken("0123f00000000000", label="twice"),
    taken("beef000000000000", label="twice"),
    taken("feed000000000000", label="a/b"),
]
ALL = [*WEBS, taken("d0d0000000000000", "db", "nightly"), taken("cafe000000000000", "db", "golden")]


@pytest.fixture
def noid(noid: Any, agent: Any) -> Any:
    agent.answers("GET", "/v1/vms/web/checkpoints", 200, WEBS)
    agent.answers("GET", "/v1/vms/db/checkpoints", 200, ALL[len(WEBS) :])
    agent.answers("GET", "/v1/checkpoints", 200, ALL)
    agent.answers("GET", "/v1/vms", 200, [VM, VM | {"name": "db"}])
    for name in ("web", "db"):
        agent.answers("POST", f"/v1/vms/{name}/restore", 200, VM | {"name": name})
        for each in ALL:
            agent.answers("DELETE", f"/v1/vms/{name}/checkpoints/{each['id']}", 204)
    return noid


def restored(agent: Any) -> tuple[str, str]:
    last = agent.requests[-1]
    assert last.method == "POST"
    return last.path.split("/")[3], last.json["checkpoint_id"]


def test_a_whole_id_of_a_named_vm_is_asked_about_nobody(noid: Any, agent: Any) -> None:
    done = noid("restore", "web", "f" * 16)
    assert done.stdout == b"VM 'web' restored from checkpoint 'ffffffffffffffff'\n"
    assert [request.path for request in agent.requests] == ["/v1/vms/web/restore"]


@pytest.mark.parametrize(("text", "id_"), [("01234", FULL), ("golden", FULL), ("beef", "beef000000000000"),
                                           ("a/b", "feed000000000000")])  # fmt: skip
def test_the_beginning_of_an_id_and_a_label_are_found_among_the_vms(noid: Any, agent: Any, text: str, id_: str) -> None:
    assert noid("restore", "web", text).stdout.decode() == f"VM 'web' restored from checkpoint '{id_}'\n"
    assert restored(agent) == ("web", id_)


@pytest.mark.parametrize("text", ["0123", "twice"])
def test_what_may_be_several_is_refused_with_all_of_them(noid: Any, agent: Any, text: str) -> None:
    done = noid("restore", "web", text)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
    assert b"0123f00000000000 (twice) of web, 2026-01-02 03:04:05" in done.stderr
    assert all(request.method == "GET" for request in agent.requests)


@pytest.mark.parametrize("text", ["fee", "nope", "d0d0", "nightly"])
def test_what_a_named_vm_has_not_is_not_taken_from_another(noid: Any, agent: Any, text: str) -> None:
    done = noid("restore", "web", text)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"VM 'web' has none with that id" in done.stderr
    assert all(request.method == "GET" for request in agent.requests)


def test_without_any_vm_the_checkpoint_says_which_one(noid: Any, agent: Any) -> None:
    assert noid("restore", "nightly").stdout == b"VM 'db' restored from checkpoint 'd0d0000000000000'\n"
    assert restored(agent) == ("db", "d0d0000000000000")
    assert noid("restore", "d0d0000000000000").returncode == 0
    assert restored(agent) == ("db", "d0d0000000000000")
    assert noid("restore", "golden").returncode == 1  # of web, or of db


def test_the_active_vm_is_never_replaced_by_another_ones_checkpoint(noid: Any, agent: Any) -> None:
    noid("use", "web")
    assert noid("restore", "golden").returncode == 0  # db's is not meant here
    assert restored(agent) == ("web", FULL)

    agent.answers("POST", "/v1/vms/web/restore", 409, {"error": "checkpoint is of VM 'db'", "code": "conflict"})
    for text in ("nightly", "d0d0000000000000"):
        done = noid("restore", text)
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"of VM 'db', and this directory's VM is 'web'" in done.stderr
        assert b"`noid restore db d0d0000000000000`" in done.stderr
    agent.answers("POST", "/v1/vms/db/restore", 200, VM | {"name": "copy"})
    assert noid("restore", "nightly", "--as", "copy").returncode == 0
    assert restored(agent) == ("db", "d0d0000000000000")


def test_what_the_server_says_of_the_active_vms_own_checkpoint_is_what_one_hears(noid: Any, agent: Any) -> None:
    noid("use", "web")
    agent.answers("POST", "/v1/vms/web/restore", 409, {"error": "VM 'web' is busy", "code": "busy"})
    assert b"VM 'web' is busy" in noid("restore", FULL).stderr
    agent.answers("POST", "/v1/vms/web/restore", 404, {"error": "checkpoint 'f' not found", "code": "not_found"})
    assert b"checkpoint 'f' not found" in noid("restore", "f" * 16).stderr


def test_rm_finds_all_before_it_removes_any(noid: Any, agent: Any) -> None:
    assert noid("rm", "nightly", "nope").returncode == 1
    assert not any(request.method == "DELETE" for request in agent.requests)
    done = noid("rm", "nightly", "beef", "web/golden", "web/a/b", "nightly")
    assert done.stderr == b""
    assert done.stdout.decode() == "".join(
        f"Checkpoint '{id_}' removed\n" for id_ in ("d0d0000000000000", "beef000000000000", FULL, "feed000000000000")
    )
    assert next(r.path for r in agent.requests if r.method == "DELETE") == "/v1/vms/db/checkpoints/d0d0000000000000"


def test_rm_of_a_whole_id_with_its_vm_is_one_request(noid: Any, agent: Any) -> None:
    done = noid("rm", "--name", "web", FULL, "--json")
    assert json.loads(done.stdout) == {"id": FULL, "vm_name": "web", "removed": True}
    assert noid("rm", f"web/{FULL}", "-q").stdout.decode() == f"{FULL}\n"
    assert [request.method for request in agent.requests] == ["DELETE", "DELETE"]


def test_rm_on_a_terminal_asks_and_names_what_goes(person: Any, noid: Any, agent: Any) -> None:
    with person(noid, "rm", "nightly") as someone:
        someone.sees(b"Remove checkpoint 'd0d0000000000000' (nightly) of VM 'db'? [y/N] ")
        someone.types(b"n\n")
        assert someone.running.wait(20) == 1
    assert not any(request.method == "DELETE" for request in agent.requests)


def test_create_from_a_checkpoint_is_a_restore_under_a_new_name(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms/db/restore", 200, VM | {"name": "copy", "labels": {"a": "b"}})
    done = noid("create", "copy", "--from", "nightly", "--label", "a=b")
    assert done.stdout == b"VM 'copy' created (state: running)\n"
    assert agent.requests[-1].json == {
        "checkpoint_id": "d0d0000000000000",
        "new_name": "copy",
        "labels": {"a": "b"},
    }
    assert noid("create", "copy", "--from", "nightly", "--cpus", "2").returncode == 2


def test_checkpoints_without_a_vm_shows_all_and_with_an_active_one_that_ones(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/checkpoints", 200, ALL[-2:])
    everything = (
        "+------------------+----+---------+---------------------+\n"
        "| id               | vm | label   | created             |\n"
        "+------------------+----+---------+---------------------+\n"
        "| d0d0000000000000 | db | nightly | 2026-01-02 03:04:05 |\n"
        "+------------------+----+---------+---------------------+\n"
        "| cafe000000000000 | db | golden  | 2026-01-02 03:04:05 |\n"
        "+------------------+----+---------+---------------------+\n"
    )
    assert noid("checkpoints").stdout.decode() == everything
    noid("use", "web")
    assert json.loads(noid("checkpoints", "--json").stdout) == WEBS
    assert noid("checkpoints", "--all").stdout.decode() == everything
    assert noid("checkpoints", "--all", "db").returncode == 2
    agent.answers("GET", "/v1/checkpoints", 200, [])
    assert noid("checkpoints", "--all").stdout == b"No checkpoints found.\n"


def test_a_server_that_lists_checkpoints_by_vm_only_is_asked_vm_by_vm(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/checkpoints", 404, {"error": "not found"})
    assert noid("restore", "nightly").returncode == 0
    assert restored(agent) == ("db", "d0d0000000000000")
    assert [request.path.partition("?")[0] for request in agent.requests] == [
        "/v1/checkpoints",
        "/v1/vms",
        "/v1/vms/web/checkpoints",
        "/v1/vms/db/checkpoints",
        "/v1/vms/db/restore",
    ]
