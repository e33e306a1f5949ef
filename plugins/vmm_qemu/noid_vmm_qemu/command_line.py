"""Turns a plan into QEMU's command line. Pure functions: the same arguments give the same list.

Every device a guest sees is decided here. A checkpoint can only be continued by the same devices in the same order,
so whoever changes what a guest sees raises `DEVICE_SETS`, and checkpoints of before are refused instead of crashing.

Paths go through JSON wherever QEMU takes it, because in its ``key=value,...`` syntax a comma in a path ends it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noid.core.backends import LaunchPlan, MachinePlan, RestorePlan
from noid.errors import InvalidRequest, Unsupported
from noid.vmmhost.taps import tap_of

DEVICE_SETS = {"microvm": "1", "q35": "2"}
#: Machines that show a guest the VM generation id: it is in ACPI tables that microvm does not make.
GENERATION_ID_MACHINES = frozenset({"q35"})
CONSOLE_DEVICE = "serial"
DISK_DEVICE = "disk"
DISK_NODE = "disk0"
BASE_NODE = "base"
BASE_ARGUMENT = "noid.base=/dev/vdb"
"""Where the guest finds the second disk of a volume in layers."""
READONLY_RAM_SINCE = (8, 2)
CMPXCHG16B_SINCE = (8, 0)
"""Before, TCG computed the flags of that instruction from those of an older one than the one before it: an interrupt
right behind it saved rubbish, and coming back from that, with the trap flag set, a kernel panicked now and then."""
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
#: For a QEMU that is still to change its user, which it can then do once: the launcher has seen to it that it, and
#: whatever it might start, can never gain anything.
SANDBOX_RUNAS = SANDBOX.replace("elevateprivileges=deny", "elevateprivileges=allow")
MACHINES = {
    # acpi=on: Debian's kernels find virtio-mmio devices through ACPI only. rtc=on: without it Linux waits 2 s at boot.
    "microvm": "microvm,acpi=on,pic=off,pit=off,rtc=on,isa-serial=on",
    "q35": "q35,vmport=off,smm=off",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What of the host decides a command line. *tsc_khz* matters under emulation only."""

    binary: str
    version: tuple[int, int, int]
    accelerator: str
    machine: str
    sandbox: bool
    tsc_khz: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptors:
    """The numbers under which the new process inherits its sockets, which listen already."""

    qmp: int
    channel: int


def launch_argv(host: Host, plan: LaunchPlan, memory: Path, fds: Descriptors, *, runas: str = "") -> list[str]:
    """Return the command that boots *plan*. *memory* is a sparse file of the guest's size, the parent of its pages.

    *runas*, ``UID:GID``, is who QEMU is to become once it has opened its files.
    """
    if "\n" in plan.cmdline or "\0" in plan.cmdline:
        raise InvalidRequest("the kernel command line contains a line break or a NUL byte.")
    base = BASE_ARGUMENT if plan.volume.base_path is not None else ""
    arguments = [kernel_arguments(host), base, plan.cmdline.strip()]
    return [
        *_common(host, plan, memory, fds, runas),
        *("-kernel", str(plan.kernel)),
        *("-initrd", str(plan.initrd)),
        *("-append", " ".join(part for part in arguments if part)),
    ]


def restore_argv(host: Host, plan: RestorePlan, fds: Descriptors, *, runas: str = "") -> list[str]:
    """Return the command that waits for ``migrate-incoming`` with the devices `launch_argv` gives.

    The wait is needed: only a machine that expects a migration skips the reset that would copy ROMs over its memory.
    It begins with the ``defer`` of QMP and not with the descriptor on the command line, so that somebody is listening
    for events when the load ends; see `QemuBackend.restore`.
    """
    return [
        *_common(host, plan, plan.memory, fds, runas),
        # The device state of a checkpoint is written without the section a live migration begins with.
        *("-global", "migration.send-configuration=off"),
        *("-incoming", "defer"),
        *(("-S",) if plan.paused else ()),
    ]


def kernel_arguments(host: Host) -> str:
    """Return the kernel arguments every guest needs here."""
    arguments = [
        "console=ttyS0",
        "quiet",
        "reboot=t",
        "panic=-1",
        "mitigations=off",
        "cryptomgr.notests",
        "random.trust_cpu=on",
        "root=/dev/vda",
        "rw",
    ]
    if host.accelerator == "tcg":
        # This machine has no PIT; where calibrating the TSC against it fails, Linux spins for ever. So it is told.
        arguments.append(f"tsc_early_khz={host.tsc_khz}")
        if host.version[:2] < CMPXCHG16B_SINCE:
            # Linux allocates memory with it where it may. CPUID goes on telling programs that it is there: with them it
            # is rare, and some do not start without. By number (bit 13 of word 4): older kernels know no names here.
            arguments.append(f"clearcpuid={4 * 32 + 13}")
    else:
        # A clone's TSC jumps, which is no reason to mistrust it.
        arguments.append("tsc=reliable")
    return " ".join(arguments)


def cpu_model(accelerator: str) -> str:
    """Return the CPU a guest sees."""
    return "host" if accelerator == "kvm" else "max"


def disk_node(node: str, path: Path, disk_format: str, *, backing: bool) -> dict[str, Any]:
    """Return the block node for *path*, as ``-blockdev`` and ``blockdev-add`` take it.

    Without *backing*, a qcow2 file is opened alone: `blockdev-snapshot` is about to put it on what is there already.
    """
    description: dict[str, Any] = {
        "driver": disk_format,
        "node-name": node,
        "discard": "unmap",
        "cache": {"direct": False, "no-flush": False},
        "file": {
            "driver": "file",
            "node-name": file_node(node),
            "filename": str(path),
            "discard": "unmap",
            "cache": {"direct": False, "no-flush": False},
        },
    }
    if disk_format == "qcow2" and not backing:
        description["backing"] = None
    return description


def file_node(node: str) -> str:
    """Return the name of the node below *node*, the file itself."""
    return f"{node}-file"


def _common(host: Host, plan: MachinePlan, memory: Path, fds: Descriptors, runas: str) -> list[str]:
    bus = "device" if host.machine == "microvm" else "pci"
    argv = [
        host.binary,
        *("-name", f"guest={_escaped(plan.instance)},debug-threads=on"),
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        *("-display", "none"),
        *("-msg", "timestamp=on"),
        *("-machine", f"{MACHINES[host.machine]},memory-backend=ram,suppress-vmdesc=on"),
        *("-accel", "kvm" if host.accelerator == "kvm" else "tcg,thread=multi"),
        *("-cpu", cpu_model(host.accelerator)),
        *("-m", f"{plan.mem_mib}M"),
        *("-smp", str(plan.cpus)),
        *("-object", json.dumps(_memory(host, plan, memory))),
        *("-chardev", f"socket,id=qmp,fd={fds.qmp},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        # The serial line is what the process was started with: see `console_line`. A socket with a logfile= would do
        # the same at first sight, but logs bytes twice whenever its client is slow.
        *("-chardev", f"stdio,id={CONSOLE_DEVICE},signal=off"),
        *("-serial", f"chardev:{CONSOLE_DEVICE}"),
        *("-device", f"virtio-serial-{bus},max_ports=2"),
        *("-chardev", f"socket,id=agent,fd={fds.channel},server=on,wait=off"),
        # Without an id QEMU does not tell when the guest closes its end.
        *("-device", "virtserialport,id=channel,chardev=agent,name=agent.0"),
        *_disks(plan, bus),
        *("-device", f"virtio-rng-{bus}"),
        *_network(plan, bus),
    ]
    if host.machine in GENERATION_ID_MACHINES:
        argv += ["-device", "vmgenid,guid=auto"]  # a new one with every start, also to continue a checkpoint
    if runas:
        argv += ["-runas", runas]
    if host.sandbox:
        argv += ["-sandbox", SANDBOX_RUNAS if runas else SANDBOX]
    return argv


def _disks(plan: MachinePlan, bus: str) -> list[str]:
    disk, base = plan.volume, plan.volume.base_path
    node = disk_node(DISK_NODE, disk.path, "raw" if base is not None else disk.format, backing=True)
    argv = ["-blockdev", json.dumps(node), "-device", f"virtio-blk-{bus},id={DISK_DEVICE},drive={DISK_NODE}"]
    if base is not None:
        node = disk_node(BASE_NODE, base, "raw", backing=True) | {"read-only": True}
        argv += ["-blockdev", json.dumps(node), "-device", f"virtio-blk-{bus},id={BASE_NODE},drive={BASE_NODE}"]
    return argv


def _memory(host: Host, plan: MachinePlan, memory: Path) -> dict[str, Any]:
    backend: dict[str, Any] = {
        "qom-type": "memory-backend-file",
        "id": "ram",  # a RAM block is found again by this name
        "size": plan.mem_mib << 20,
        "mem-path": str(memory),
        "share": False,  # the guest's writes stay private: one image serves any number of clones
        "dump": False,
        "merge": False,
    }
    if host.version[:2] >= READONLY_RAM_SINCE:
        # Older ones open the image for writing, though nothing is ever written to it.
        backend |= {"readonly": True, "rom": "off"}
    return backend


def _network(plan: MachinePlan, bus: str) -> list[str]:
    lease = plan.lease
    if lease is None or lease.kind == "none":
        return []
    tap = tap_of(lease)
    if tap is None and lease.kind != "user":
        raise Unsupported("qemu", f"connect a VM by a {lease.kind!r} lease")
    device = f"virtio-net-{bus},netdev=net0"
    if lease.mac:
        device += f",mac={lease.mac}"
    backend = "user,id=net0" if tap is None else f"tap,id=net0,ifname={_escaped(tap)},script=no,downscript=no"
    return ["-netdev", backend, "-device", device]


def _escaped(text: str) -> str:
    return text.replace(",", ",,")
