"""QEMU's command line: the whole of it, once, and what changes with the plan and the host."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from noid_vmm_qemu.command_line import Descriptors, Host, disk_node, launch_argv, restore_argv

from noid.core.backends import LaunchPlan, RestorePlan
from noid.core.model.storage import Volume
from noid.core.model.vms import NetLease
from noid.errors import InvalidRequest, Unsupported

HOST = Host(
    binary="qemu-system-x86_64",
    version=(7, 2, 22),
    accelerator="tcg",
    machine="microvm",
    sandbox=True,
    tsc_khz=2596000,
)
VOLUME = Volume(directory=Path("/d/v"), format="raw", top="disk.raw", files=("disk.raw",))
LAUNCH = LaunchPlan(
    instance="i1",
    directory=Path("/d/v"),
    run_dir=Path("/r/i1"),
    data_dir=Path("/d"),
    cpus=2,
    mem_mib=256,
    volume=VOLUME,
    lease=None,
    kernel=Path("/k/vmlinux"),
    initrd=Path("/k/initrd"),
    cmdline="quota=1",
)
RESTORE = RestorePlan(
    instance="i1",
    directory=Path("/d/v"),
    run_dir=Path("/r/i1"),
    data_dir=Path("/d"),
    cpus=2,
    mem_mib=256,
    volume=VOLUME,
    lease=None,
    memory=Path("/d/v/memory"),
    state=Path("/c/state"),
)
FDS = Descriptors(qmp=10, channel=11)
MEMORY = Path("/d/v/memory")

COMMON = [
    "qemu-system-x86_64",
    "-name", "guest=i1,debug-threads=on",
    "-nodefaults", "-no-user-config", "-no-reboot",
    "-display", "none",
    "-msg", "timestamp=on",
    "-machine",
    "microvm,acpi=on,pic=off,pit=off,rtc=on,isa-serial=on,memory-backend=ram,suppress-vmdesc=on",
    "-accel", "tcg,thread=multi",
    "-cpu", "max",
    "-m", "256M",
    "-smp", "2",
    "-object",
    '{"qom-type": "memory-backend-file", "id": "ram", "size": 268435456, "mem-path": "/d/v/memory", "share": false, '
    '"dump": false, "merge": false}',
    "-chardev", "socket,id=qmp,fd=10,server=on,wait=off",
    "-mon", "chardev=qmp,mode=control",
    "-chardev", "stdio,id=serial,signal=off",
    "-serial", "chardev:serial",
    "-device", "virtio-serial-device,max_ports=2",
    "-chardev", "socket,id=agent,fd=11,server=on,wait=off",
    "-device", "virtserialport,id=channel,chardev=agent,name=agent.0",
    "-blockdev",
    '{"driver": "raw", "node-name": "disk0", "discard": "unmap", "cache": {"direct": false, "no-flush": false}, '
    '"file": {"driver": "file", "node-name": "disk0-file", "filename": "/d/v/disk.raw", "discard": "unmap", '
    '"cache": {"direct": false, "no-flush": false}}}',
    "-device", "virtio-blk-device,id=disk,drive=disk0",
    "-device", "virtio-rng-device",
    "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
]  # fmt: skip


def value_of(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_booting_is_this_command() -> None:
    assert launch_argv(HOST, LAUNCH, MEMORY, FDS) == [
        *COMMON,
        *("-kernel", "/k/vmlinux"),
        *("-initrd", "/k/initrd"),
        "-append",
        "console=ttyS0 quiet reboot=t panic=-1 mitigations=off cryptomgr.notests random.trust_cpu=on root=/dev/vda rw "
        "tsc_early_khz=2596000 clearcpuid=141 quota=1",
    ]


def test_restoring_has_the_same_devices_and_waits_for_the_state() -> None:
    assert restore_argv(HOST, RESTORE, FDS) == [
        *COMMON,
        *("-global", "migration.send-configuration=off"),
        *("-incoming", "defer"),
    ]


def test_kvm_shows_the_hosts_cpu_and_needs_no_frequency() -> None:
    argv = launch_argv(dataclasses.replace(HOST, accelerator="kvm"), LAUNCH, MEMORY, FDS)

    assert (value_of(argv, "-accel"), value_of(argv, "-cpu")) == ("kvm", "host")
    assert "tsc=reliable" in value_of(argv, "-append")
    assert "tsc_early_khz" not in value_of(argv, "-append")


def test_kernels_use_cmpxchg16b_where_its_flags_are_right() -> None:
    assert "clearcpuid" in value_of(launch_argv(HOST, LAUNCH, MEMORY, FDS), "-append")
    for right in ({"version": (8, 0, 0)}, {"accelerator": "kvm"}):
        assert "clearcpuid" not in value_of(
            launch_argv(dataclasses.replace(HOST, **right), LAUNCH, MEMORY, FDS), "-append"
        )


def test_q35_has_the_devices_on_pci() -> None:
    argv = launch_argv(dataclasses.replace(HOST, machine="q35"), LAUNCH, MEMORY, FDS)

    assert value_of(argv, "-machine").startswith("q35,")
    assert "vmgenid,guid=auto" in argv
    assert "vmgenid,guid=auto" not in launch_argv(HOST, LAUNCH, MEMORY, FDS)
    assert [word for word in argv if word.startswith("virtio-")] == [
        "virtio-serial-pci,max_ports=2",
        "virtio-blk-pci,id=disk,drive=disk0",
        "virtio-rng-pci",
    ]


@pytest.mark.parametrize(("version", "readonly"), [((7, 2, 22), False), ((8, 1, 5), False), ((8, 2, 0), True)])
def test_a_newer_qemu_opens_the_memory_image_for_reading_only(version: tuple[int, int, int], readonly: bool) -> None:
    argv = restore_argv(dataclasses.replace(HOST, version=version), RESTORE, FDS)

    memory = json.loads(value_of(argv, "-object"))
    assert (memory.get("readonly", False), memory.get("rom")) == ((True, "off") if readonly else (False, None))
    assert memory["share"] is False


def test_a_user_lease_is_a_card_and_none_is_no_card() -> None:
    lease = NetLease(kind="user", mac="52:54:00:12:34:56")
    argv = launch_argv(HOST, dataclasses.replace(LAUNCH, lease=lease), MEMORY, FDS)

    assert value_of(argv, "-netdev") == "user,id=net0"
    assert "virtio-net-device,netdev=net0,mac=52:54:00:12:34:56" in argv
    none = launch_argv(HOST, dataclasses.replace(LAUNCH, lease=NetLease(kind="none")), MEMORY, FDS)
    assert none == launch_argv(HOST, LAUNCH, MEMORY, FDS)


def test_a_lease_of_another_kind_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="bridge"):
        launch_argv(HOST, dataclasses.replace(LAUNCH, lease=NetLease(kind="bridge")), MEMORY, FDS)


def test_a_tap_is_taken_by_its_name_and_no_script_is_run() -> None:
    lease = NetLease(kind="tap", tap_name="t,0", mac="52:54:00:12:34:56")
    argv = launch_argv(HOST, dataclasses.replace(LAUNCH, lease=lease), MEMORY, FDS)

    assert value_of(argv, "-netdev") == "tap,id=net0,ifname=t,,0,script=no,downscript=no"
    assert "virtio-net-device,netdev=net0,mac=52:54:00:12:34:56" in argv


def test_commas_and_spaces_in_paths_stay_in_the_paths() -> None:
    odd = Path("/d/a,b =c")
    volume = dataclasses.replace(VOLUME, directory=odd)
    argv = launch_argv(HOST, dataclasses.replace(LAUNCH, directory=odd, volume=volume), odd / "memory", FDS)

    assert json.loads(value_of(argv, "-object"))["mem-path"] == "/d/a,b =c/memory"
    assert json.loads(value_of(argv, "-blockdev"))["file"]["filename"] == "/d/a,b =c/disk.raw"


@pytest.mark.parametrize("cmdline", ["a\nb", "a\0b"])
def test_a_kernel_command_line_is_one_line(cmdline: str) -> None:
    with pytest.raises(InvalidRequest):
        launch_argv(HOST, dataclasses.replace(LAUNCH, cmdline=cmdline), MEMORY, FDS)


def test_a_host_without_seccomp_goes_without_the_sandbox() -> None:
    assert "-sandbox" not in launch_argv(dataclasses.replace(HOST, sandbox=False), LAUNCH, MEMORY, FDS)


def test_only_a_layer_about_to_be_pivoted_onto_is_opened_without_what_it_lies_on() -> None:
    pivot = disk_node("n", Path("/d/l2.qcow2"), "qcow2", backing=False)
    normal = disk_node("n", Path("/d/l2.qcow2"), "qcow2", backing=True)

    assert pivot["backing"] is None
    assert {**normal, "backing": None} == pivot
    assert "backing" not in normal
    assert "backing" not in disk_node("n", Path("/d/disk.raw"), "raw", backing=False)
