"""A process for `test_kill_nine`: an agent that does random things to VMs and says each before and after it is done.

Arguments: data directory, seed. One JSON object per line on standard output: ``{"begin": op, ...}`` and, once the
agent has acknowledged it, ``{"done": op, ...}``. It ends only by being killed.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import trio

from noid.core.agent import Agent
from noid.core.database.listing import Wanted
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest
from noid.core.model.vms import VmSpec
from noid.core.opening import open_agent
from noid.testing.simulated_agent import simulated_config, simulated_plugins

TOKEN = "/dev/shm/token"


def say(event: str, op: str, **facts: str) -> None:
    print(json.dumps({event: op, **facts}), flush=True)  # noqa: T201  # that is what it is for


async def write_token(agent: Agent, name: str, token: str) -> None:
    async with agent.guests.reach(agent.local_user(), name) as guest:
        process = await guest.start(ExecRequest(argv=("tee", TOKEN), user="root", stdin=True))
        await process.send_stdin(token.encode())
        await process.close_stdin()
        while not isinstance(await process.receive(), ProcessExit):
            pass
        await guest.release(process)


async def act(agent: Agent, chance: random.Random) -> None:
    """Do one thing that can be done now."""
    user = agent.local_user()
    name = chance.choice("abc")
    if name not in {vm.name for vm in agent.vms(user)}:
        say("begin", "create", name=name)
        await agent.create_vm(user, VmSpec(name=name, mem_mib=128))
        say("done", "create", name=name)
        return
    mine = [c.id for c in agent.services.store.checkpoints(user.id, Wanted(vm_name=name))]
    op = chance.choice(["write", "write", "checkpoint", "checkpoint", "restore", "restore", "destroy"])
    if op == "write":
        token = f"{chance.getrandbits(32):08x}"
        say("begin", op, name=name, token=token)
        await write_token(agent, name, token)
        say("done", op, name=name, token=token)
    elif op == "checkpoint":
        say("begin", op, name=name)
        outcome = await agent.checkpoints.take(user, name, None)
        assert outcome.checkpoint is not None
        say("done", op, name=name, id=outcome.checkpoint.id)
    elif op == "restore" and mine:
        checkpoint = chance.choice(mine)
        say("begin", op, name=name, id=checkpoint)
        await agent.restore_vm(user, name, checkpoint, None)
        say("done", op, name=name, id=checkpoint)
    elif op == "destroy":
        say("begin", op, name=name)
        await agent.destroy_vm(user, name)
        say("done", op, name=name)


async def main() -> None:
    """Be restless until killed."""
    chance = random.Random(int(sys.argv[2]))  # noqa: S311  # to be repeated, not to be secret
    async with open_agent(simulated_config(Path(sys.argv[1])), simulated_plugins()) as agent:
        say("done", "start")
        while True:
            await act(agent, chance)


if __name__ == "__main__":
    trio.run(main)
