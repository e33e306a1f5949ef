"""Finds out whether the Firecracker of this host can run a guest, by letting it run one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.errors import DependencyDown
from noid.hostfs import os_errors
from noid.vmmhost.asking import answer_of
from noid.vmmhost.process import boot_id
from noid_vmm_firecracker.kvm_trial import WORD, write_files
from noid_vmm_firecracker.versions import VERSION_MIN, WHY_MIN, Version, parsed, shown

RELEASES = "https://github.com/firecracker-microvm/firecracker/releases"
_ANSWER_SECS = 10.0
_KVM_SECS = 15.0
_FORMAT = 1
_MEMORY_NAME = "firecracker-probe.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found. *kvm_refusal* says why no guest can run here, and is empty where one can."""

    path: str
    version: Version
    kvm_refusal: str


async def probe(binary: str, run_dir: Path) -> Found:
    """Return what *binary* can do here. A good end is remembered in *run_dir* for this boot and this build.

    Raises:
        DependencyDown: there is no Firecracker, it does not start, or it is older than `VERSION_MIN`.
    """
    path = shutil.which(binary)
    if path is None:
        raise DependencyDown(
            f"{binary} is not installed, and without it no VM can run here. Take the release for x86_64 from "
            f"{RELEASES} and put its program, renamed to firecracker, on the PATH, or name it as `binary` in "
            "server.toml [plugins.vmm_firecracker]."
        )
    version = await version_of(path)
    key = _key(path, version)
    memory = run_dir / _MEMORY_NAME
    if _is_remembered(memory, key):
        return Found(path=path, version=version, kvm_refusal="")
    refusal = await _kvm_refusal(path)
    if not refusal:  # a bad end may be mended at any time: by joining a group, by loading a module
        await trio.to_thread.run_sync(_remember, memory, key)
    return Found(path=path, version=version, kvm_refusal=refusal)


async def version_of(path: str) -> Version:
    """Return the version of the Firecracker, or jailer, at *path*, by asking it.

    Raises:
        DependencyDown: it does not answer, is something else, or is older than `VERSION_MIN`.
    """
    result = await answer_of([path, "--version"], _ANSWER_SECS)
    if result is None:
        raise DependencyDown(f"{path} --version did not answer within {_ANSWER_SECS:.0f} s. Install it again.")
    status, output = result
    version = parsed(output)
    if status != 0 or version is None:
        raise DependencyDown(f"{path} does not work (status {status}): {output.strip()[-500:]}. Install it again.")
    if version < VERSION_MIN:
        raise DependencyDown(
            f"{path} is Firecracker {shown(version)}; noid needs at least {shown(VERSION_MIN)}: {WHY_MIN}. Take a "
            f"newer one from {RELEASES}, or name it as `binary` in server.toml [plugins.vmm_firecracker]."
        )
    return version


async def _kvm_refusal(path: str) -> str:
    """Return why no guest can run here, or nothing: found out by running one."""
    if os.access("/dev/kvm", os.F_OK) and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "this user may not open /dev/kvm (add it to the group kvm)"
    with os_errors("preparing a trial of KVM"), tempfile.TemporaryDirectory(prefix="noid-kvm-") as directory:
        config = await trio.to_thread.run_sync(write_files, Path(directory))
        argv = [path, "--no-api", "--config-file", str(config), "--log-path", f"{directory}/log", "--level", "Error"]
        result = await answer_of(argv, _KVM_SECS)
    if result is None:
        return f"a trial guest did not come to its end within {_KVM_SECS:.0f} s"
    status, output = result
    if WORD not in output.encode():
        return f"a trial guest failed (status {status}): {output.strip()[-500:] or 'it said nothing'}"
    return ""


def _key(path: str, version: Version) -> str:
    facts = Path(path).stat()
    return f"{_FORMAT} {boot_id()} {path} {facts.st_ino} {facts.st_mtime_ns} {shown(version)}"


def _is_remembered(memory: Path, key: str) -> bool:
    try:
        return bool(json.loads(memory.read_text())["works"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not there, or not ours any more: trying again is always right


def _remember(memory: Path, key: str) -> None:
    partial = memory.with_suffix(".partial")
    try:
        partial.write_text(json.dumps({"works": key}))
        partial.replace(memory)
    except OSError as error:
        log.warning("what Firecracker can do is tried anew each time, because %s cannot be written: %s", memory, error)
