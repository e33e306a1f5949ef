"""VMs that nobody named, VMs that are called something else, and the words their owners put on them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from noid.cli.friendly_names import invented
from noid.core.model.names import checked_name

VM = {"name": "web", "state": "running", "cpus": 1, "mem_mib": 512, "created_at": "2026-01-02 03:04:05"}
CHECKPOINT = {"id": "0123456789abcdef", "vm_name": "web", "label": None, "created_at": "2026-01-02 03:04:05"}


def test_an_invented_name_is_a_vm_name_and_a_host_name() -> None:
    names = {invented(number) for number in (None, 9999) for _ in range(3000)}
    assert len(names) > 4000
    for name in names:
        assert checked_name(name) == name
        assert re.fullmatch(r"[a-z]+-[a-z]+(-[0-9]{4})?", name)
        assert len(name) <= 32


def test_create_without_a_name_invents_one_and_another_one_if_that_is_taken(noid: Any, agent: Any) -> None:
    asked: list[str] = []

    def answer(method: str, path: str) -> bytes:
        asked.append(agent.requests[-1].json["name"])
        if len(asked) < 3:
            agent.answers(method, path, 409, {"error": f"VM '{asked[-1]}' already exists", "code": "conflict"})
        else:
            agent.answers(method, path, 201, VM | {"name": asked[-1]})
        return bytes(type(agent).answer_of(agent, method, path))

    agent.answer_of = answer
    done = noid("create", "-q")
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(set(asked)) == 3
    assert re.fullmatch(r"[a-z]+-[a-z]+", asked[0])
    assert re.fullmatch(r"[a-z]+-[a-z]+-[0-9]{4}", asked[1])
    assert done.stdout.decode() == f"{asked[2]}\n"


def test_a_refusal_for_another_reason_is_not_tried_again(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms", 403, {"error": "you may have 1 VM", "code": "quota"})
    done = noid("create")
    assert (done.returncode, len(agent.requests)) == (1, 1)
    assert b"you may have 1 VM" in done.stderr


def test_create_passes_labels_on_and_can_make_the_vm_this_directorys(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms", 201, VM | {"labels": {"tier": "front", "team": "a=b"}})
    done = noid("create", "web", "--label", "tier=front", "--label", "team=a=b", "--use")
    assert done.stdout == b"VM 'web' created (state: running)\nActive VM set to 'web'\n"
    assert done.stderr == b""
    assert agent.requests[0].json["labels"] == {"tier": "front", "team": "a=b"}
    assert (noid.cwd / ".noid-vm").read_text() == "web\n"


def test_a_server_that_keeps_no_labels_is_told_of_and_never_taken_for_one_that_chose_by_them(
    noid: Any, agent: Any
) -> None:
    agent.answers("POST", "/v1/vms", 201, VM)
    done = noid("create", "web", "--label", "tier=front")
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1)
    assert b"keeps no labels" in done.stderr

    agent.answers("GET", "/v1/vms?label=tier%3Dfront", 200, [VM])
    done = noid("list", "-q", "--label", "tier=front")  # `| xargs noid destroy` would be next
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"keeps no labels" in done.stderr


def test_list_asks_for_the_labels_it_is_given(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms?label=tier%3Dfront&label=team", 200, [VM | {"labels": {"tier": "front", "team": ""}}])
    assert noid("list", "-q", "--label", "tier=front", "--label", "team").stdout == b"web\n"


@pytest.mark.parametrize("text", ["tier", "=front", "a b=c", "x" * 64 + "=1", "k=" + "v" * 257])
def test_what_is_no_label_is_said_before_anything_is_asked(noid: Any, agent: Any, text: str) -> None:
    done = noid("create", "web", "--label", text)
    assert done.returncode in (1, 2)
    assert b"label" in done.stderr
    assert agent.requests == []


def test_label_sets_removes_and_shows(noid: Any, agent: Any) -> None:
    agent.answers("PATCH", "/v1/vms/web", 200, VM | {"labels": {"tier": "front\n", "x": ""}})
    agent.answers("GET", "/v1/vms/web", 200, VM | {"labels": {}})
    assert noid("label", "web", "tier=front\n", "x=", "old-").stdout == b"tier=front\\n\nx=\n"
    assert agent.requests[0].json == {"labels": {"tier": "front\n", "x": "", "old": None}}
    assert noid("label", "web").stdout == b"No labels.\n"
    noid("use", "web")
    assert noid("label", "old-").returncode == 0
    assert agent.requests[-1].json == {"labels": {"old": None}}
    assert noid("label", "web", "nonsense").returncode == 2


def test_a_checkpoint_is_labelled_by_whatever_names_it(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/checkpoints", 200, [CHECKPOINT | {"label": "golden"}])
    path = f"/v1/vms/web/checkpoints/{CHECKPOINT['id']}"
    agent.answers("PATCH", path, 200, CHECKPOINT | {"labels": {"keep": "yes"}})
    assert noid("label", "--checkpoint", "golden", "keep=yes").stdout == b"keep=yes\n"
    assert noid("label", "web", "--checkpoint", str(CHECKPOINT["id"]), "keep=yes").stdout == b"keep=yes\n"
    assert [request.method for request in agent.requests] == ["GET", "PATCH", "PATCH"]


def test_rename_says_both_names_and_this_directory_goes_on_meaning_the_vm(noid: Any, agent: Any) -> None:
    agent.answers("PATCH", "/v1/vms/web", 200, VM | {"name": "www"})
    assert noid("rename", "web", "www").stdout == b"VM 'web' renamed to 'www'\n"
    assert agent.requests[0].json == {"name": "www"}
    noid("use", "web")
    assert noid("rename", "www").stdout == b"VM 'web' renamed to 'www'\nActive VM set to 'www'\n"
    assert (noid.cwd / ".noid-vm").read_text() == "www\n"
    assert json.loads(noid("rename", "--name", "web", "www", "--json").stdout)["name"] == "www"
    assert noid("rename", "web", "-x").returncode == 2
    assert noid("rename").returncode == 2
