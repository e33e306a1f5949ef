"""``kill -9`` of the agent at random moments: what was acknowledged is there, and nothing is left of the rest."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest

Rig = Any  # see conftest.py
ROUNDS = 20
SEED = int(os.environ.get("NOID_TEST_SEED", "20261121"))  # set another one to look for new trouble
AGENT = Path(__file__).with_name("restless_agent.py")
TOKEN = "/dev/shm/token"
GONE = "(no VM)"
UNWRITTEN = ""


class Expected:
    """What the killed agents have acknowledged: by VM and by checkpoint, the tokens its memory may hold."""

    def __init__(self) -> None:
        self.vms: dict[str, set[str]] = {}
        self.checkpoints: dict[str, set[str]] = {}

    def hear(self, lines: list[dict[str, str]]) -> None:
        """Follow one agent's account. What it began and never acknowledged may have happened or not."""
        for line in lines:
            event, op = next(iter(line.items()))
            if op == "start":
                continue
            now = self.vms.setdefault(line["name"], {GONE})
            after = {
                "create": {UNWRITTEN},
                "write": {line.get("token", "")},
                "checkpoint": now,
                "restore": self.checkpoints.get(line.get("id", ""), set()),
                "destroy": {GONE},
            }[op]
            if op == "checkpoint" and event == "done":
                self.checkpoints[line["id"]] = set(now)
            if op == "write" and event == "begin":
                after.add(UNWRITTEN)  # a program killed between opening its file and writing it leaves an empty one
            self.vms[line["name"]] = set(after) if event == "done" else now | after


@pytest.mark.deadline(300)
async def test_what_was_acknowledged_survives_and_nothing_else_is_left(rig: Rig, no_leaks: None) -> None:
    chance = random.Random(SEED)  # noqa: S311  # to be repeated, not to be secret
    expected = Expected()
    survived = 0
    for number in range(ROUNDS):
        lines = await killed_agent(rig.data_dir, seed=chance.getrandbits(32), chance=chance)
        survived += len(lines)
        expected.hear(lines)
        async with rig.agent() as noid:
            await check(rig, noid, expected, where=f"round {number}, after {lines[-3:]}")
    assert survived > ROUNDS * 5, "the agents were killed before they did anything"
    async with rig.agent() as noid:
        for vm in noid.agent.vms(noid.user):
            await noid.destroy(vm.name)


async def killed_agent(data_dir: Path, *, seed: int, chance: random.Random) -> list[dict[str, str]]:
    """Run a restless agent, kill it at some moment, one in five times while it starts, and return what it said."""
    in_start = chance.random() < 0.2
    delay_secs = chance.uniform(0.2, 0.5) if in_start else chance.uniform(0.05, 0.8)
    process = await trio.lowlevel.open_process(
        [sys.executable, str(AGENT), str(data_dir), str(seed)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    said = b""
    try:
        if not in_start:
            said = await process.stdout.receive_some()
            assert said, "the agent did not start"
        await trio.sleep(delay_secs)  # the moment is what is random here
    finally:
        process.kill()
    async for data in process.stdout:
        said += data
    assert await process.wait() == -signal.SIGKILL, "the agent ended by itself"
    return [json.loads(line) for line in said.splitlines(keepends=True) if line.endswith(b"\n")]


async def check(rig: Rig, noid: Any, expected: Expected, where: str) -> None:
    states = noid.states()
    for name, tokens in expected.vms.items():
        found = GONE if name not in states else await token_of(noid, name)
        assert found in tokens, f"{where}: VM {name} holds {found!r}, expected one of {tokens}"
        expected.vms[name] = {found}
    assert set(states.values()) <= {"running"}, where
    assert rig.machines() == len(states), where
    instances = [vm.instance for vm in noid.agent.vms(noid.user)]
    assert rig.stray(*instances) == [], where
    assert noid.agent.services.store.open_operations() == [], where
    for checkpoint in noid.agent.services.store.checkpoints(noid.user.id):
        if checkpoint.id not in expected.checkpoints:  # made, and killed before it could say so
            expected.checkpoints[checkpoint.id] = set()
    known = {c.id for c in noid.agent.services.store.checkpoints(noid.user.id)}
    assert expected.checkpoints.keys() <= known, where
    on_disk = {path.name for path in rig.layout.checkpoint(noid.user.id, "x").parent.glob("*")}
    assert on_disk == known, where
    for checkpoint_id, tokens in list(expected.checkpoints.items())[-1:]:
        vm_name = noid.agent.services.store.checkpoint(noid.user.id, checkpoint_id).vm_name
        await noid.restore(checkpoint_id, name=vm_name, new_name="trial")
        found = await token_of(noid, "trial")
        assert not tokens or found in tokens, where
        expected.checkpoints[checkpoint_id] = {found}
        await noid.destroy("trial")
    for checkpoint_id, tokens in list(expected.checkpoints.items()):
        if not tokens:  # nobody has said what it holds, so nobody knows what restoring it gives
            del expected.checkpoints[checkpoint_id]


async def token_of(noid: Any, name: str) -> str:
    async with noid.agent.guests.reach(noid.user, name) as guest:
        process = await guest.start(ExecRequest(argv=("cat", TOKEN), user="root"))
        text = b""
        while not isinstance(event := await process.receive(), ProcessExit):
            text += event.data if event.stream == 1 else b""
        await guest.release(process)
        return text.decode()
