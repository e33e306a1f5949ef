"""The power switch: stop, start and reboot VMs, pause and resume them. The steps are in `power` and `pausing`."""

from __future__ import annotations

import logging

import trio

from noid.core.model.names import checked_name
from noid.core.model.users import User
from noid.core.model.vms import Vm, VmState
from noid.core.operations.outcomes import Outcome
from noid.core.operations.performing import Performer
from noid.core.operations.saga import Facts, Saga
from noid.core.operations.work import Work
from noid.core.services import Services
from noid.core.vms import pausing, power, states
from noid.core.vms.sight import Sight
from noid.errors import Conflict, NoidError

logger = logging.getLogger(__name__)


class PowerSwitch:
    """Switches one host's VMs. Every method that takes a user sees that user's VMs only."""

    def __init__(self, services: Services, operations: Performer, sight: Sight) -> None:
        self._services = services
        self._store = services.store
        self._operations = operations
        self._sight = sight

    async def stop(self, user: User, name: str, grace_secs: float) -> Outcome:
        """Let the guest shut down, and end its machine if that takes longer than *grace_secs*; 0 ends it at once.

        A VM that does not run is fine.

        Raises:
            NotFound: there is no such VM.
            Conflict: it is being made or destroyed.
        """
        vm = self._store.vm(user.id, checked_name(name))
        states.require("stop", name, vm.state)
        facts = power.facts_of_power(vm, grace_secs=grace_secs)
        return await self._perform(power.STOP_VM, "stop", user, vm, facts)

    async def start(self, user: User, name: str) -> Outcome:
        """Boot a stopped or dead VM on its disk. Returns when its guest has booted; a VM that runs is fine.

        Raises:
            NotFound: there is no such VM, or its image is gone.
            Conflict: it is being made or destroyed.
            DependencyDown, DeadlineExceeded: it does not boot; it is stopped, its disk as the boot has left it.
        """
        vm = self._sight.one(user, name)
        states.require("start", name, vm.state)
        if vm.state is VmState.RUNNING and vm.busy is None:
            return Outcome(kind=power.START_VM.kind, vm=vm)
        return await self._perform(power.START_VM, "start", user, vm, power.facts_of_power(vm))

    async def reboot(self, user: User, name: str, grace_secs: float) -> Outcome:
        """Let the guest shut down as in `stop`, then boot it as in `start`.

        Raises:
            NotFound: there is no such VM, or its image is gone; then it was not stopped.
            Conflict: it does not run.
            DependencyDown, DeadlineExceeded: it does not boot; it is stopped.
        """
        vm = self._store.vm(user.id, checked_name(name))
        states.require("reboot", name, vm.state)
        return await self._reboot(user, vm, grace_secs)

    async def pause(self, user: User, name: str) -> Outcome:
        """Stop the VM's CPUs. Memory, disk, connections and its place on the host stay; a paused VM is fine.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
        """
        vm = self._sight.one(user, name)
        states.require("pause", name, vm.state)
        if vm.state is VmState.PAUSED and vm.busy is None:
            return Outcome(kind=pausing.PAUSE_VM.kind, vm=vm)
        return await self._perform(pausing.PAUSE_VM, "pause", user, vm, pausing.facts_of_pause(vm))

    async def resume(self, user: User, name: str) -> Outcome:
        """Let the CPUs of a paused VM go on where they stood. A VM that runs is fine.

        Raises:
            NotFound: there is no such VM.
            Conflict: it is neither paused nor running.
        """
        vm = self._sight.one(user, name)
        states.require("resume", name, vm.state)
        if vm.state is VmState.RUNNING and vm.busy is None:
            return Outcome(kind=pausing.RESUME_VM.kind, vm=vm)
        return await self._perform(pausing.RESUME_VM, "resume", user, vm, pausing.facts_of_pause(vm))

    async def boot_again(self, vm: Vm) -> None:
        """Start a VM again whose guest has reset its machine."""
        await self._reboot(self._store.user(vm.owner), vm, 0.0)

    async def finish_reboot(self, vm: Vm) -> None:
        """Start a VM again that was being rebooted when the last agent ended. What fails is logged."""
        try:
            await self.start(self._store.user(vm.owner), vm.name)
        except NoidError as error:
            logger.warning("VM %s was being rebooted and does not come back: %s", vm.name, error)
        except Exception:  # a bug here must not end the agent
            logger.exception("VM %s was being rebooted and does not come back", vm.name)

    async def _reboot(self, user: User, vm: Vm, grace_secs: float) -> Outcome:
        await trio.to_thread.run_sync(self._services.images.get, vm.image)  # before anything is stopped for nothing
        fresh = self._store.vm(user.id, vm.name)
        if fresh.instance != vm.instance:
            raise Conflict(f"VM {vm.name!r} was restored or made anew at the same time. Look at it again and repeat.")
        states.require("reboot", vm.name, fresh.state)
        facts = power.facts_of_power(vm, grace_secs=grace_secs, again=True)
        return await self._perform(power.REBOOT_VM, "reboot", user, vm, facts)

    async def _perform(self, table: Saga[Work], what: str, user: User, vm: Vm, facts: Facts) -> Outcome:
        return await self._operations.run(table, what, user, (vm.name,), facts, self._operations.work(user, vm=vm))
