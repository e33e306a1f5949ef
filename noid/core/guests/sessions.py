"""Sessions of every VM: which machine's processes are whose, as machines come and go. `vmsessions` is one machine's."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from noid.core.backends import MachineExit
from noid.core.guests.vmsessions import VmSessions
from noid.core.layout import Layout
from noid.core.model.vms import Vm
from noid.core.vms.supervisor import Live
from noid.errors import DependencyDown, LineageEnded

SAVE_SECS = 5.0


class Sessions:
    """The sessions of every VM. It hears of machines from the supervisor."""

    def __init__(self, nursery: trio.Nursery, layout: Layout, reattach_secs: float) -> None:
        self._nursery = nursery
        self._layout = layout
        self._reattach_secs = reattach_secs
        self._by_vm: dict[str, VmSessions] = {}

    async def of(self, vm: Vm) -> VmSessions:
        """Return *vm*'s, also if its machine has ended."""
        found = self._by_vm.get(vm.id)
        if found is None or found.instance != vm.instance:
            found = self._by_vm[vm.id] = self._new(vm.id, vm.instance, None)
            await found.discover()
        return found

    def _new(self, vm_id: str, instance: str, live: Live | None) -> VmSessions:
        directory = self._layout.vm(instance)
        return VmSessions(vm_id, instance, directory, live, self._nursery, self._reattach_secs)

    async def known(self, vm_ids: Iterable[str]) -> None:
        """Wait until it is known what runs in those VMs, which it is not when this agent has just started.

        A guest that does not tell counts for nothing: what runs there costs this agent nothing either.
        """
        async with trio.open_nursery() as nursery:
            for vm_id in vm_ids:
                if vm_id in self._by_vm:
                    nursery.start_soon(self._by_vm[vm_id].known)

    def running(self, vm_ids: Iterable[str]) -> int:
        """Return how many processes run, or are being started, in those VMs, as far as this agent knows."""
        found = [self._by_vm[vm_id] for vm_id in vm_ids if vm_id in self._by_vm]
        return sum(sessions.running for sessions in found)

    async def save(self) -> None:
        """Write down what is only in memory: the agent ends. Bounded."""
        with trio.move_on_after(SAVE_SECS):
            for sessions in list(self._by_vm.values()):
                await sessions.save()

    # --- what the supervisor tells ------------------------------------------------------------------------------------

    def held(self, live: Live) -> None:
        """A machine has become a VM's."""
        sessions = self._by_vm[live.vm_id] = self._new(live.vm_id, live.instance, live)
        self._nursery.start_soon(sessions.discover)

    def released(self, vm_id: str, replaced: bool) -> None:
        """The VM's machine is about to be ended, because the VM is, or *replaced* by another one."""
        sessions = self._by_vm.pop(vm_id, None)
        if sessions is not None:
            gone = DependencyDown("the VM was destroyed, and this process with it.")
            sessions.close(LineageEnded() if replaced else gone, keep=False)

    def ended(self, live: Live, why: MachineExit) -> None:
        """A machine has ended by itself."""
        sessions = self._by_vm.get(live.vm_id)
        if sessions is not None and sessions.instance == live.instance:
            sessions.close(
                DependencyDown(
                    f"the VM ended ({why.reason}), and this process with it. What it wrote is kept: see its log, or "
                    "restore the VM from a checkpoint."
                ),
                keep=True,
            )
