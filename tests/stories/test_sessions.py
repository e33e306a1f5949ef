"""A command outlives the agent that started it, and its client never notices; copies of it are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

COUNT = "i=0; while [ $i -lt 60 ]; do echo n $i; i=$((i+1)); sleep 0.05; done; exit 7"


@pytest.mark.deadline(120)
def test_a_client_gets_every_line_once_although_the_agent_was_killed(house: House, tmp_path: Path) -> None:
    house.create("web")
    seen = tmp_path / "seen"
    with seen.open("wb") as out, house.start("exec", "web", "--", "sh", "-c", COUNT, stdout=out) as typed:
        house.eventually(lambda: seen.read_bytes().count(b"\n") > 5)
        house.end_agent()
        house("list")  # starts the next agent
        assert typed.wait(60) == 7
    assert seen.read_bytes() == b"".join(b"n %d\n" % number for number in range(60))

    process = house.ok("exec", "web", "-d", "--", "sleep", "1000").strip()
    checkpoint = house.checkpoint("web")
    house.ok("restore", "web", checkpoint)
    house.ok("restore", "web", checkpoint, "--as", "copy")

    def origins(vm: str) -> dict[str, str]:
        return {found["id"]: found["origin"] for found in house("ps", vm, "--json").json}

    assert origins("web") == {process: "rewound"}
    assert origins("copy") == {process: "forked-copy"}
    house.ok("kill", "copy", process)
    assert house("wait", "copy", process).code == 143
    assert house("ps", "web", "--json").json[0]["state"] == "running"
