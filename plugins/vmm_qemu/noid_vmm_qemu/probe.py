"""Finds out what the QEMU of this host can do, by letting it do it."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import signal
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from noid.errors import DependencyDown
from noid.hostfs import os_errors
from noid.vmmhost.asking import answer_of
from noid.vmmhost.process import boot_id
from noid_vmm_qemu.command_line import SANDBOX, cpu_model
from noid_vmm_qemu.kvm_trial import EXIT_STATUS, rom

VERSION_MIN = (7, 2, 0)
_ANSWER_SECS = 10.0
_KVM_SECS = 15.0
_KVM_CPU_SECS = 2
_FORMAT = 2
_PACKAGES = {
    "alpine": "apk add qemu-system-x86_64",
    "arch": "pacman -S qemu-system-x86",
    "debian": "apt install qemu-system-x86",
    "fedora": "dnf install qemu-system-x86-core",
    "rhel": "dnf install qemu-kvm",
    "suse": "zypper install qemu-x86",
    "ubuntu": "apt install qemu-system-x86",
}

_UNDECIDED = "a trial guest did not come to its end in time on it; the host may be too busy"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What was found. *kvm_refusal* says why KVM cannot be used, and is empty where it can."""

    version: tuple[int, int, int]
    sandbox: bool
    kvm_refusal: str


async def probe(binary: str, run_dir: Path, *, try_kvm: bool) -> Abilities:
    """Return what *binary* can do here. Remembered in *run_dir* for one boot of this host and one build of QEMU.

    Raises:
        DependencyDown: there is no QEMU, it does not start, or it is older than `VERSION_MIN`.
    """
    path = shutil.which(binary)
    if path is None:
        raise DependencyDown(missing(binary))
    version = await _version(path)
    key = _key(path, version, try_kvm=try_kvm)
    memory = run_dir / "qemu-probe.json"
    known = _recalled(memory, key)
    if known is None:
        known = Abilities(
            version=version,
            sandbox=await _sandbox_works(path),
            kvm_refusal=await _kvm_refusal(path) if try_kvm else "it was not tried",
        )
        if known.kvm_refusal != _UNDECIDED:  # a host that is too busy now has time later
            await trio.to_thread.run_sync(_remember, memory, key, known)
    return known


def missing(binary: str) -> str:
    """Return what to say when there is no *binary*."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    command = next((_PACKAGES[name] for name in names if name in _PACKAGES), None)
    how = f"Install it with: {command}" if command else "Install your distribution's QEMU for x86_64 guests"
    return f"{binary} is not installed, and without it no VM can run here. {how}"


def trial_arguments(bios: str, accelerator: str, cpu: str) -> list[str]:
    """Return QEMU's arguments for running the ROM *bios* of `kvm_trial`."""
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-M", "microvm,pic=off,pit=off", "-accel", accelerator, "-cpu", cpu, "-m", "16M"),
        *("-bios", bios, "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    ]


def parsed_version(text: str) -> tuple[int, int, int] | None:
    """Return the version in the first line of ``--version``, or None when there is none."""
    found = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def version_text(version: tuple[int, int, int]) -> str:
    """Return *version* as people and QMP write it."""
    return ".".join(str(part) for part in version)


async def _version(path: str) -> tuple[int, int, int]:
    result = await answer_of([path, "--version"], _ANSWER_SECS)
    if result is None:
        raise DependencyDown(f"{path} --version did not answer within {_ANSWER_SECS:.0f} s. Reinstall QEMU.")
    status, output = result
    version = parsed_version(output)
    if status != 0 or version is None:
        raise DependencyDown(f"{path} does not work (status {status}): {output.strip()[-500:]}. Reinstall QEMU.")
    if version < VERSION_MIN:
        raise DependencyDown(
            f"{path} is QEMU {version_text(version)}; noid needs at least {version_text(VERSION_MIN)}. Install a newer "
            "one, or name it as `binary` in server.toml [plugins.vmm_qemu]."
        )
    return version


async def _sandbox_works(path: str) -> bool:
    """Whether this QEMU was built with seccomp, and the kernel has it."""
    argv = [path, "-nodefaults", "-no-user-config", "-display", "none", "-M", "none", "-accel", "tcg"]
    argv += ["-sandbox", SANDBOX, "-S", "-qmp", "stdio"]
    quits = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
    result = await answer_of(argv, _ANSWER_SECS, quits)
    if result is None or result[0] != 0:
        log.warning("QEMU runs without its sandbox here: %s", "no answer" if result is None else result[1].strip())
        return False
    return True


async def _kvm_refusal(path: str) -> str:
    """Return why KVM cannot be used, or nothing: found out by running code on it."""
    if not os.access("/dev/kvm", os.F_OK):
        return "there is no /dev/kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "this user may not open /dev/kvm (add it to the group kvm)"
    with os_errors("preparing a trial of KVM"), tempfile.NamedTemporaryFile(prefix="noid-kvm-") as file:
        file.write(rom())
        file.flush()
        argv = [path, *trial_arguments(file.name, "kvm", cpu_model("kvm"))]
        if (prlimit := shutil.which("prlimit")) is not None:
            # Judged by a processor's time: of the clock's, a busy host may give a trial as little as it likes.
            argv = [prlimit, f"--cpu={_KVM_CPU_SECS}:{_KVM_CPU_SECS + 1}", *argv]
        result = await answer_of(argv, _KVM_SECS)
    if result is None:
        return _UNDECIDED
    status, output = result
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"a trial guest did not come to its end within {_KVM_CPU_SECS} s of a processor's time on it"
    if status != EXIT_STATUS:
        return f"a trial guest failed on it (status {status}): {output.strip()[-300:]}"
    return ""


def _key(path: str, version: tuple[int, int, int], *, try_kvm: bool) -> str:
    facts = Path(path).stat()
    kvm = try_kvm and os.access("/dev/kvm", os.R_OK | os.W_OK)
    build = f"{path} {facts.st_ino} {facts.st_mtime_ns} {version_text(version)}"
    return f"{_FORMAT} {boot_id()} {build} try_kvm={try_kvm} kvm={kvm}"


def _recalled(memory: Path, key: str) -> Abilities | None:
    try:
        record = json.loads(memory.read_text())
        if record["key"] != key:
            return None
        found = record["found"]
        return Abilities(version=tuple(found["version"]), sandbox=found["sandbox"], kvm_refusal=found["kvm_refusal"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not ours any more: probing again is always right


def _remember(memory: Path, key: str, abilities: Abilities) -> None:
    partial = memory.with_suffix(".partial")
    try:
        partial.write_text(json.dumps({"key": key, "found": asdict(abilities)}))
        partial.replace(memory)
    except OSError as error:
        log.warning("what QEMU can do here is tried anew each time, because %s cannot be written: %s", memory, error)
