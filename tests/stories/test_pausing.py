"""Pausing a real VM: it stands still whoever comes and goes, and goes on where it stood."""

from __future__ import annotations

from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

#: Whoever reads the number reads a whole one.
COUNT = "n=0; while :; do n=$((n+1)); echo $n > /dev/shm/.n; mv /dev/shm/.n /dev/shm/n; sleep 0.02; done"


def test_a_paused_vm_outlives_its_agent_paused_and_counts_on_when_it_is_resumed(house: House) -> None:
    house.create("web")
    house.ok("exec", "web", "-d", "--", "sh", "-c", COUNT)
    house.eventually(lambda: int(house.guest("web", "cat /dev/shm/n || echo 0")) > 3)
    machines = house.machines()

    status, vm = house.http("POST", "/v1/vms/web/pause")
    assert (status, vm["state"]) == (200, "paused")
    assert house("exec", "web", "--", "true").complaint.startswith("cannot exec VM 'web': it is paused.")
    house.end_agent()
    assert house.states() == {"web": "paused"}
    assert house.machines() == machines
    status, checkpoint = house.http("POST", "/v1/vms/web/checkpoints")
    assert status == 201
    assert house.states() == {"web": "paused"}

    house.ok("restore", "web", checkpoint["id"], "--as", "copy")  # wakes at the number at which the other one stands
    there = int(house.guest("copy", "cat /dev/shm/n"))
    status, vm = house.http("POST", "/v1/vms/web/resume")
    assert (status, vm["state"]) == (200, "running")
    first = int(house.guest("web", "cat /dev/shm/n"))
    house.eventually(lambda: int(house.guest("web", "cat /dev/shm/n")) > first)
    house.eventually(lambda: int(house.guest("copy", "cat /dev/shm/n")) > there)
    assert house.machines()[house.instance("web")] == machines[house.instance("web")]
    assert house.strays() == []
