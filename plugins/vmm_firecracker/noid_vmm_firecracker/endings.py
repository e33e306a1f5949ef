"""Why a machine ended, from the last words of its console: Firecracker itself ends with 0 whatever happened.

A guest that powers off only halts, because there is no device that could switch the machine off: Firecracker goes on
for ever. So when the kernel's last word is that, and no vCPU has run since, it is over.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from noid.core.backends import MachineExit

_TAIL_BYTES = 4096
_HALTED = re.compile(rb"reboot: (?:System halted|Power down|Power off not available)")
_RESET = re.compile(rb"reboot: (?:Restarting system|machine restart)")
_PANIC = re.compile(rb"Kernel panic - not syncing: ([^\r\n]*)")


def tail(log: Path) -> bytes:
    """Return the end of a console log; nothing where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read()
    except OSError:
        return b""


def says_halted(said: bytes) -> bool:
    """Whether the last line is that of a kernel that has switched off."""
    return _HALTED.search(_last_line(said)) is not None


def ending(said: bytes, *, killed: bool, how: str) -> MachineExit:
    """Return why a process has ended by what it *said*; *how* is what is known of its end as a process."""
    if killed:
        return MachineExit(reason="killed", detail=how)
    if panic := _PANIC.search(said):
        words = panic[1].decode(errors="replace")[:200]
        return MachineExit(reason="unknown", detail=f"the guest's kernel panicked: {words}")
    if _RESET.search(_last_line(said)):
        return MachineExit(reason="reset", detail="the guest restarted")
    return MachineExit(reason="unknown", detail=f"Firecracker ended without a word of the guest's: {how}")


def vcpu_runtime_ns(pid: int) -> int:
    """Return how long the vCPUs of Firecracker *pid* have run, 0 when that is not known."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            if (task / "comm").read_text().startswith("fc_vcpu"):
                total += int((task / "schedstat").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            continue
    return total


def _last_line(said: bytes) -> bytes:
    lines = said.split(b"\n")
    return next((line for line in reversed(lines) if line.strip()), b"")
