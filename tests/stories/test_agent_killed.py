"""``kill -9`` of the agent at any moment: the next command finds every VM running and nothing half done."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

WORD = "cat /dev/shm/word /root/word"


@pytest.fixture
def house(house: House) -> House:
    """A house where a VM 'web' runs that remembers something, with a checkpoint of it."""
    house.create("web")
    house.guest("web", "echo then > /dev/shm/word; echo then > /root/word")
    return house


def kill_agent_during(house: House, *command: str, until: Callable[[], object]) -> None:
    """Type a command and kill the agent as soon as *until* says that it is in the middle of it."""
    with house.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as typed:
        house.eventually(lambda: typed.poll() is not None or until())
        house.end_agent()
        out, err = typed.communicate(timeout=60)
        if typed.returncode == 0:
            return  # it was faster than the kill: then it has happened
        assert (typed.returncode, out) == (1, b"")
        assert err.startswith(b"Error: connection error: ")
        assert err.count(b"\n") == 1


def test_while_idle(house: House) -> None:
    machines = house.machines()
    for _ in range(2):
        house.end_agent()
        assert house.states() == {"web": "running"}
        assert house.guest("web", WORD) == "then\nthen"
    assert house.machines() == machines
    assert house.strays() == []


@pytest.mark.parametrize("what", ["reserved", "machine"])
def test_during_a_create(house: House, what: str) -> None:
    before = house.machines()
    until = {
        "reserved": lambda: house.rows("SELECT 1 FROM vms WHERE name = 'new'"),
        "machine": lambda: house.machines().keys() - before.keys(),
    }[what]
    kill_agent_during(house, "create", "new", "--mem", "96", "--image", "tiny", until=until)
    states = house.states()
    assert states in ({"web": "running"}, {"web": "running", "new": "running"})
    assert house.strays() == []
    assert len(house.machines()) == len(states)
    if "new" not in states:
        house.create("new")
    assert house.guest("new", "hostname") == "new"
    assert house.guest("web", WORD) == "then\nthen"


@pytest.mark.parametrize("sign", ["disk", "state", "manifest.json"])
def test_during_a_checkpoint(house: House, sign: str) -> None:
    until = lambda: list(house.layout.users.glob(f"*/checkpoints/*/{sign}"))  # noqa: E731  # said once
    kill_agent_during(house, "checkpoint", "web", until=until)
    assert house.states() == {"web": "running"}
    assert house.guest("web", WORD) == "then\nthen"
    assert house.strays() == []
    listed = house("checkpoints", "web", "--json").json
    again = house.checkpoint("web")
    for checkpoint in [*(c["id"] for c in listed), again]:  # what is listed is whole
        house.ok("restore", "web", checkpoint, "--as", "copy")
        assert house.guest("copy", WORD) == "then\nthen"
        house.ok("destroy", "copy")


@pytest.mark.parametrize("what", ["directory", "machine", "two machines no more"])
def test_during_a_restore_in_place(house: House, what: str) -> None:
    checkpoint = house.checkpoint("web")
    house.guest("web", "echo now > /dev/shm/word; echo now > /root/word; sync")
    old = house.machines()
    (instance,) = old
    until = {
        "directory": lambda: len(list(house.layout.vms.iterdir())) > 1,
        "machine": lambda: house.machines().keys() - old.keys(),
        "two machines no more": lambda: instance not in house.machines(),
    }[what]
    kill_agent_during(house, "restore", "web", checkpoint, until=until)
    assert house.states() == {"web": "running"}
    assert house.guest("web", WORD) in ("now\nnow", "then\nthen")
    assert len(house.machines()) == 1
    assert house.strays() == []
    house.ok("restore", "web", checkpoint)
    assert house.guest("web", WORD) == "then\nthen"


def test_during_a_destroy(house: House) -> None:
    (instance,) = house.machines()
    kill_agent_during(house, "destroy", "web", until=lambda: instance not in house.machines())
    assert house.states() == {}  # a destroy that has begun is carried on
    assert house.machines() == {}
    assert house.strays() == []
