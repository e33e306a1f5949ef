"""How Firecracker comes onto a host: where its release is, what is one, and what a host needs for it."""

from __future__ import annotations

import os
import platform
import resource
import tempfile
from pathlib import Path

from noid.core.backends import SetupFinding, VmmSetup
from noid.errors import NoidError
from noid_vmm_firecracker.probe import RELEASES, probe, version_of
from noid_vmm_firecracker.versions import NEWEST_KNOWN, VERSION_MIN, WHY_MIN, shown

PROGRAMS = ("firecracker", "jailer")
FILES_MIN = 4096
_CGROUPS = Path("/sys/fs/cgroup")
_CONTROLLERS = frozenset({"cpu", "memory", "pids"})


def firecracker_setup() -> VmmSetup:
    """Return what ``noid-server setup --vmm firecracker`` needs to know."""
    release = f"v{shown(NEWEST_KNOWN)}-{platform.machine()}"
    archive = f"firecracker-{release}.tgz"
    return VmmSetup(
        name="firecracker",
        source=(
            f"Firecracker {shown(VERSION_MIN)} or newer; {shown(NEWEST_KNOWN)} is the newest that noid knows.",
            f"Older than {shown(VERSION_MIN)} is refused: {WHY_MIN}.",
            f"  release    {RELEASES}/tag/v{shown(NEWEST_KNOWN)}",
            f"  archive    {RELEASES}/download/v{shown(NEWEST_KNOWN)}/{archive}",
            f"  checksum   {RELEASES}/download/v{shown(NEWEST_KNOWN)}/{archive}.sha256.txt",
            f"  in it      release-{release}/firecracker-{release}, release-{release}/jailer-{release}",
            "Take archive and checksum to this host, and then:",
            f"  noid-server setup --vmm firecracker --file {archive} --checksum {archive}.sha256.txt",
        ),
        programs=PROGRAMS,
        in_archive=rf"(?:\./)?release-[^/]+/{{program}}-v[0-9][^/]*-{platform.machine()}",
        version_of=_version_of,
        examine=_examine,
    )


async def _version_of(program: str, path: Path) -> str:
    del program  # both tell theirs in the same way
    return shown(await version_of(str(path)))


async def _examine(path: Path) -> list[SetupFinding]:
    return [await _kvm(path), _cgroups(), _open_files(), _file_size()]


async def _kvm(path: Path) -> SetupFinding:
    with tempfile.TemporaryDirectory(prefix="noid-setup-") as scratch:
        try:
            refusal = (await probe(str(path), Path(scratch))).kvm_refusal
        except NoidError as error:
            return SetupFinding(what="firecracker", status="fail", text=str(error))
    if not refusal:
        return SetupFinding(what="kvm", status="ok", text="Firecracker has run a trial guest")
    next_step = 'Load kvm_intel or kvm_amd, or use QEMU, which needs no KVM: [backends] vmm = "qemu".'
    return SetupFinding(what="kvm", status="fail", text=refusal, next=next_step)


def _cgroups() -> SetupFinding:
    controllers = _CGROUPS / "cgroup.controllers"
    if not controllers.exists():
        found = {name for name in _CONTROLLERS if (_CGROUPS / name).is_dir()}
        kind = "version 1"
    else:
        found = set(controllers.read_text().split())
        kind = "version 2"
    lacking = ", ".join(sorted(_CONTROLLERS - found))
    if lacking:
        text = f"cgroups {kind} are without {lacking}"
        return SetupFinding(what="cgroups", status="warn", text=text, next="VMs run, and are not limited by them.")
    return SetupFinding(what="cgroups", status="ok", text=f"{kind}, with {', '.join(sorted(_CONTROLLERS))}")


def _open_files() -> SetupFinding:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most == resource.RLIM_INFINITY or most >= FILES_MIN:
        return SetupFinding(what="open files", status="ok", text="as many as are needed")
    hint = f"Raise it to {FILES_MIN} or more for whoever runs the agent: LimitNOFILE= in its unit."
    return SetupFinding(what="open files", status="warn", text=f"at most {most} for a process", next=hint)


def _file_size() -> SetupFinding:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if most == resource.RLIM_INFINITY:
        return SetupFinding(what="file size", status="ok", text="not limited")
    hint = f"Checkpoints are files as large as a VM's memory: let user {os.geteuid()} write larger ones."
    return SetupFinding(what="file size", status="fail", text=f"at most {most} bytes", next=hint)
