"""What a VMM's log, its environment and the host's CPU tell about it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

FINGERPRINT_VARIABLE = "NOID_VMM_FINGERPRINT"
"""In the environment of a VMM's process: the fingerprint it was started with, as JSON."""

_LOG_TAIL_BYTES = 2000
_QCOW2_SIZE_END = 32  # big-endian, in bytes 24 to 31
_CPU_FACTS = ("vendor_id", "cpu family", "model", "stepping", "flags")


def make_sparse(path: Path, size_bytes: int) -> None:
    """Make the new file *path* of *size_bytes*, all of it a hole."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)


def disk_bytes(path: Path, disk_format: str) -> int:
    """Return how large a guest sees the disk *path*, raw or qcow2.

    Raises:
        OSError: there is none.
    """
    if disk_format == "qcow2":
        with path.open("rb") as file:
            head = file.read(_QCOW2_SIZE_END)
        if len(head) == _QCOW2_SIZE_END:
            return int.from_bytes(head[-8:], "big")
    return path.stat().st_size


def said_since(log_path: Path, offset: int) -> str:
    """Return the end of what was written to a log from *offset* on, on one line."""
    try:
        with log_path.open("rb") as file:
            file.seek(max(offset, log_path.stat().st_size - _LOG_TAIL_BYTES))
            said = file.read().decode(errors="replace")
    except OSError as error:
        return f"(its log cannot be read: {error})"
    return " / ".join(line.strip() for line in said.splitlines() if line.strip()) or "(none)"


def difference(fingerprint: Mapping[str, str], pid: int) -> str:
    """Return in what the process *pid* was started differs from how it would be started now; empty when in nothing."""
    prefix = f"{FINGERPRINT_VARIABLE}=".encode()
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        started = json.loads(next(entry for entry in entries if entry.startswith(prefix))[len(prefix) :])
    except (OSError, StopIteration, ValueError):
        return "settings that are not known"
    names = sorted(fingerprint.keys() | started.keys())
    return ", ".join(
        f"{name} {started.get(name)!r} (now {fingerprint.get(name)!r})"
        for name in names
        if started.get(name) != fingerprint.get(name)
    )


def host_cpu() -> str:
    """Return a digest of what kind of CPU this host has: under KVM the guest sees just that."""
    text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    facts = dict(re.findall(r"^(.+?)\s*: (.*)$", text, re.MULTILINE))
    wanted = "\n".join(" ".join(sorted(facts.get(name, "").split())) for name in _CPU_FACTS)
    return hashlib.sha256(wanted.encode()).hexdigest()[:16]
