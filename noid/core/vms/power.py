"""Power, as tables: stop, start, reboot. Instance and disk of the VM stay; its memory and its process do not.

A started VM boots the kernel and initrd its image has today on the disk the VM has, however that was left: after an
orderly stop, or as after a power cut. Each step may fail, be cancelled or be cut off by a crash (see `saga`).
"""

from __future__ import annotations

import logging
from typing import Any

import trio

from noid import hostfs
from noid.core.backends import LaunchPlan
from noid.core.checkpoints import manifest as manifests
from noid.core.checkpoints.templates import check_disk_of
from noid.core.database import deeds
from noid.core.database.store import Tx
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest
from noid.core.model.vms import Vm, VmSpec, VmState, WakeReason
from noid.core.operations.saga import Facts, Saga, Step
from noid.core.operations.work import Work, given
from noid.core.vms import pausing, processes
from noid.core.vms.machines import end_machine, lease_network, wake_because
from noid.core.vms.supervisor import Live
from noid.core.waiting import console_tail, until_it_ends
from noid.errors import DeadlineExceeded, NoidError, NotFound

logger = logging.getLogger(__name__)

GRACE_SECS = 30.0
GRACE_SECS_MAX = 3600.0
#: How long the guest agent may take to acknowledge, at most: then the power button is pressed instead.
ASK_SECS = 10.0
#: What of a saga's deadline is left for everything but waiting for the guest to end.
MARGIN_SECS = 60.0

CLEAN = "clean"
FORCED = "forced"
ALREADY = "already stopped"


# --- down: the guest ends, or is ended -------------------------------------------------------------------------------


async def end_guest(work: Work, facts: Facts) -> dict[str, Any]:
    """Ask the guest to shut down, wait ``grace_secs``, then end its machine. A machine that has gone is fine."""
    services, grace_secs = work.services, float(facts["grace_secs"])
    live = services.supervisor.find(facts["vm_id"])
    if live is None or live.instance != facts["instance"]:
        return {"how": ALREADY}
    if grace_secs > 0:
        with trio.move_on_after(grace_secs):
            await _ask_to_end(live, facts, min(ASK_SECS, grace_secs / 2))
            await live.gone.wait()
    if live.gone.is_set():
        ended = given(live.why)
        orderly = ended.reason in ("shutdown", "reset")
        return {"how": CLEAN if orderly else f"ended by itself ({ended.reason})"}
    await live.machine.kill()
    await live.gone.wait()  # whoever watches the machine closes it and tells who was attached
    return {"how": f"killed after {grace_secs:g} s" if grace_secs > 0 else FORCED}


async def _ask_to_end(live: Live, facts: Facts, ask_secs: float) -> None:
    """Let the guest know, by its agent or else by the power button. A guest that hears neither is no error here."""
    try:
        await live.machine.resume()  # a paused guest hears nothing
        with trio.fail_after(ask_secs):
            async with live.link.guest() as guest:
                await (guest.reboot() if facts["again"] else guest.power_off())
    except (NoidError, trio.TooSlowError) as error:
        why = str(error) or f"it does not answer within {ask_secs:g} s"
        logger.info("the agent of VM %s cannot be asked to shut down: %s", facts["name"], why)
    else:
        return
    try:
        await live.machine.press_power_button()
    except NoidError as error:
        logger.info("VM %s has no power button that works: %s", facts["name"], error)


async def settle(work: Work, facts: Facts) -> None:
    """Say in the row what is true: a VM whose machine has gone is stopped, and nothing runs in its name.

    Also after a crash, when recovery has found no machine and called the VM dead.
    """
    services = work.services
    if _has_machine(work, facts):  # if it was asked to end and does so later, its end is written down then
        await _stand_still_again(work, facts)
        return
    await trio.to_thread.run_sync(processes.end_instance, services.config.data_dir, facts["instance"])

    def change(tx: Tx) -> None:
        vm = tx.current(facts["vm_id"])
        if vm.instance == facts["instance"] and vm.state in (VmState.RUNNING, VmState.PAUSED, VmState.DEAD):
            tx.update_vm(vm, state=VmState.STOPPED, process=None, ended=_ended(facts))

    await services.store.write(change)


async def _stand_still_again(work: Work, facts: Facts) -> None:
    """Pause the machine of a paused VM, which was let go so that its guest could hear that it shall end."""
    vm = next((vm for vm in work.services.store.all_vms() if vm.id == facts["vm_id"]), None)
    if vm is not None and vm.state is VmState.PAUSED:
        await pausing.if_it_lives(work, facts, pausing.stand_still)


async def end_launched(work: Work, facts: Facts) -> None:
    """End what `launch_machine` has made. Not what the VM runs on: a page of the journal may be undone late."""
    if work.machine is not None or not _has_machine(work, facts):
        await end_machine(work, facts)


def _has_machine(work: Work, facts: Facts) -> bool:
    """Return whether the machine that the VM's row names is alive, held by this agent or not."""
    found = [vm for vm in work.services.store.all_vms() if vm.id == facts["vm_id"]]
    process = found[0].process if found and found[0].instance == facts["instance"] else None
    return process is not None and processes.reference(process.pid) == process


def _ended(facts: Facts) -> str:
    how = facts.get("how")
    return f"stopped: {how}" if how else "stopped"


# --- up: the VM's own disk boots --------------------------------------------------------------------------------------


async def clear_away(work: Work, facts: Facts) -> None:
    """Remove what the last machine leaves: a process nobody holds, its memory, its sockets."""
    services = work.services
    await trio.to_thread.run_sync(processes.end_instance, services.config.data_dir, facts["instance"])
    directory, run_dir = services.layout.vm(facts["instance"]), services.layout.run(facts["instance"])
    with hostfs.os_errors("making room for the VM's new machine"):
        (directory / "memory").unlink(missing_ok=True)
        run_dir.mkdir(parents=True, mode=0o700, exist_ok=True)


async def launch_machine(work: Work, facts: Facts) -> None:
    """Boot the VM's disk with its image's kernel. From here on the VM's manifest speaks of this boot."""
    services, vm = work.services, given(work.vm)
    directory = services.layout.vm(facts["instance"])
    try:
        image = await trio.to_thread.run_sync(services.images.get, vm.image)
    except NotFound as error:
        raise NotFound(
            f"VM {vm.name!r} cannot boot: its image {vm.image!r}, which has its kernel, is not there any more. Build "
            "or import an image of that name; the VM's disk is untouched."
        ) from error
    check_disk_of(image, services.storage)
    spec = VmSpec(name=vm.name, cpus=vm.cpus, mem_mib=vm.mem_mib, image=vm.image)
    work.volume = await trio.to_thread.run_sync(services.storage.volume, directory)
    boot = {
        "image_digest": image.digest,
        "kernel_release": image.kernel_release,
        "network": work.lease.kind if work.lease else "none",
        "fingerprint": services.vmm.fingerprint(),
    }
    with hostfs.os_errors("writing down what the VM boots"):
        await trio.to_thread.run_sync(lambda: manifests.amend(directory, **boot))
    work.machine = await services.vmm.launch(
        LaunchPlan(
            instance=facts["instance"],
            directory=directory,
            run_dir=services.layout.run(facts["instance"]),
            data_dir=services.config.data_dir,
            cpus=vm.cpus,
            mem_mib=vm.mem_mib,
            volume=work.volume,
            lease=work.lease,
            kernel=image.kernel,
            initrd=image.initrd,
            cmdline=" ".join([image.cmdline, *work.templates.boot_args(spec)]).strip(),
        )
    )
    work.ready = image.ready


async def wait_for_guest(work: Work, facts: Facts) -> None:
    """Wait until the guest's agent answers and its ready command has ended, as a template's boot does.

    A guest that answers and is never ready is handed over all the same: whoever broke its boot has to get in.
    """
    services, machine = work.services, given(work.machine)
    directory, secs = services.layout.vm(facts["instance"]), services.config.boot_timeout_secs
    known = await trio.to_thread.run_sync(manifests.read, directory)
    work.link = services.supervisor.link(machine, directory, known.exec)
    answers = False
    try:
        with trio.fail_after(secs):
            async with until_it_ends(machine, directory), work.link.guest() as guest:
                answers = True
                process = await guest.start(ExecRequest(argv=given(work.ready)))
                while not isinstance(await process.receive(), ProcessExit):
                    pass
                await guest.release(process)
    except trio.TooSlowError as error:
        if not answers:
            raise DeadlineExceeded(
                f"the guest of VM {facts['name']!r} did not answer within {secs:g} s of its boot."
                f"{console_tail(directory)} Its disk is as the boot has left it; try again, raise boot_timeout_secs in "
                "server.toml, or restore a checkpoint."
            ) from error
        logger.warning("VM %s is not ready after %g s; it runs as it is", facts["name"], secs)


async def wake_booted(work: Work, facts: Facts) -> None:
    """Tell the guest who it is. It is who it was before; only what a boot forgets is new."""
    await wake_because(work, facts, WakeReason.BOOT)


def commit_started(work: Work, facts: Facts, tx: Tx) -> None:
    """The VM runs on its new machine."""
    tx.update_vm(
        tx.current(facts["vm_id"]),
        state=VmState.RUNNING,
        process=given(work.machine).ref,
        lease=work.lease,
        network=work.lease.kind if work.lease else "none",
        receipt=work.receipt,
        ended=None,
    )
    deeds.write_vm(work.services.layout, tx.current(facts["vm_id"]), given(work.user))


def commit_stopped(work: Work, facts: Facts, tx: Tx) -> None:
    """The VM is stopped. One that was dead before it could be asked stays so."""
    vm = tx.current(facts["vm_id"])
    if vm.state in (VmState.RUNNING, VmState.PAUSED):
        tx.update_vm(vm, state=VmState.STOPPED, process=None, ended=_ended(facts))


# --- the tables -------------------------------------------------------------------------------------------------------


def facts_of_power(vm: Vm, *, grace_secs: float = 0.0, again: bool = False) -> Facts:
    """Name what is stopped or started. *again*: it is to come up again afterwards."""
    return {"vm_id": vm.id, "instance": vm.instance, "name": vm.name, "grace_secs": grace_secs, "again": again}


DOWN: Step[Work] = Step("down", end_guest, settle)
UP: tuple[Step[Work], ...] = (
    Step("clear", clear_away),
    Step("lease", lease_network),  # a VM keeps its lease until it is destroyed
    Step("launch", launch_machine, end_launched),
    Step("boot", wait_for_guest),
    Step("wake", wake_booted),
)

STOP_VM: Saga[Work] = Saga(
    "vm.stop", (DOWN,), commit_stopped, deadline_secs=GRACE_SECS_MAX + MARGIN_SECS, needs_room=False
)
START_VM: Saga[Work] = Saga("vm.start", UP, commit_started, deadline_secs=900.0)
REBOOT_VM: Saga[Work] = Saga(  # without room it is a stop: also when it was the guest that has reset the machine
    "vm.reboot", (DOWN, *UP), commit_started, deadline_secs=GRACE_SECS_MAX + 900.0, needs_room=False
)
