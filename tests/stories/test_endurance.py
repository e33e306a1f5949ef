"""Many commands leave nothing behind: not in the server, not in the VMM, not in the guest."""

from __future__ import annotations

from typing import Any

import pytest
from noid_bench.endurance import Endurance

from noid.client.settings import Endpoint
from noid.core import paths

House = Any  # see conftest.py
pytestmark = pytest.mark.vm


@pytest.mark.deadline(240)
def test_nothing_grows_by_commands_in_a_row_and_at_once(house: House) -> None:
    house.settings("max_ws_sessions = 64\n[pool]\nsize = 0\n")
    house.create("busy")
    (server_pid,) = house.agents()
    endurance = Endurance(
        endpoint=Endpoint(socket_path=paths.socket_path(house.data_dir)),
        vm="busy",
        server_pid=server_pid,
        vmm_pid=house.machines()[house.instance("busy")],
    )
    endurance.in_a_row(50)
    endurance.at_once(50)
    before = endurance.footprint()

    endurance.in_a_row(500)
    endurance.at_once(50)

    assert endurance.footprint().growth(before) == []
