"""Waiting until a VM is not what it was."""

from __future__ import annotations

from noid.core.agent import Agent
from noid.core.model.users import User
from noid.core.model.vms import Vm


async def vm_after(agent: Agent, user: User, name: str, generation: int) -> Vm:
    """Return *user*'s VM as soon as its generation is greater than that; it grows with every change of its row.

    Also when another VM has got the name meanwhile. Bound it with ``move_on_after``.

    Raises:
        NotFound: there is no such VM, or no longer.
    """
    vm = agent.vm(user, name)
    first = vm.id
    while vm.id == first and vm.generation <= generation:
        await agent.services.store.vm_changed(vm.id)
        vm = agent.vm(user, name)
    return vm
