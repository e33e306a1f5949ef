"""Which VM a command means: what was said, else what the directory says, else nothing."""

from __future__ import annotations

from typing import Any

import pytest

VM = {"name": "web", "state": "running", "cpus": 1, "mem_mib": 512, "created_at": "2026-01-02 03:04:05"}
ID = "0123456789abcdef"


def test_the_argument_wins_over_the_directory(noid: Any, agent: Any) -> None:
    (noid.cwd / ".noid-vm").write_text("other\n")
    agent.answers("GET", "/v1/vms/web", 200, VM)
    assert noid("info", "web").returncode == 0
    assert noid("info", "--name", "web").returncode == 0


@pytest.mark.parametrize("marker", [".noid-vm", ".noid"])
def test_without_an_argument_the_directory_s_marker_decides(noid: Any, agent: Any, marker: str) -> None:
    (noid.cwd / marker).write_text(" web \n")
    agent.answers("GET", "/v1/vms/web", 200, VM)
    assert noid("info").returncode == 0


def test_a_directory_called_noid_is_no_marker(noid: Any) -> None:
    (noid.cwd / ".noid").mkdir()
    done = noid("info")
    assert done.returncode == 1
    assert done.stderr == b"Error: no VM specified. Pass a name or run: noid use <name>\n"


def test_a_marker_that_holds_no_name_is_refused_by_the_name_of_the_file(noid: Any, agent: Any) -> None:
    (noid.cwd / ".noid-vm").write_text("../etc\n")
    done = noid("info")
    assert done.returncode == 1
    assert b".noid-vm" in done.stderr
    assert agent.requests == []


def test_two_different_names_are_a_usage_error(noid: Any) -> None:
    assert noid("info", "a", "--name", "b").returncode == 2


def test_restore_with_one_word_means_the_checkpoint_of_this_directory_s_vm(noid: Any, agent: Any) -> None:
    (noid.cwd / ".noid-vm").write_text("web\n")
    agent.answers("POST", "/v1/vms/web/restore", 200, VM)
    assert noid("restore", ID).returncode == 0
    assert noid("restore", ID, "--name", "web").returncode == 0
    assert [request.json for request in agent.requests] == [{"checkpoint_id": ID}] * 2


@pytest.mark.parametrize("words", [[], ["a", "b", "c"]])
def test_restore_wants_one_or_two_words(noid: Any, words: list[str]) -> None:
    assert noid("restore", *words).returncode == 2


@pytest.mark.parametrize("name", ["", ".x", "-x", "a..b", "a/b", "a b", "x" * 65, "a\nb"])
def test_a_bad_name_is_refused_before_anything_is_sent(noid: Any, agent: Any, name: str) -> None:
    done = noid("create", "--", name)
    assert done.returncode in (1, 2)
    assert done.stderr
    assert noid("use", "--", name).returncode in (1, 2)
    assert agent.requests == []
    assert not (noid.cwd / ".noid-vm").exists()


def test_a_new_vm_never_takes_its_name_from_the_directory(noid: Any, agent: Any) -> None:
    (noid.cwd / ".noid-vm").write_text("web\n")
    noid("create")
    assert agent.requests[0].json["name"] != "web"
