"""VMM processes as the kernel shows them: finding the ones nobody owns, and ending one for sure.

A VMM carries ``NOID_DATA_DIR`` and ``NOID_INSTANCE`` in its environment. That finds it even when the agent died between
starting it and writing down its pid, and it never finds another agent's.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from noid.core.model.vms import ProcessRef

_KILL_SECS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundProcess:
    """A process that says it is the machine *instance*."""

    pid: int
    instance: str


def find(data_dir: Path) -> Iterator[FoundProcess]:
    """Yield the processes that belong to the agent of *data_dir*. Blocking: reads all of ``/proc``."""
    wanted = b"NOID_DATA_DIR=" + os.fsencode(data_dir)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or belongs to somebody else
            continue
        if wanted in environment:
            for variable in environment:
                if variable.startswith(b"NOID_INSTANCE="):
                    yield FoundProcess(
                        pid=int(entry.name), instance=variable.partition(b"=")[2].decode("ascii", "replace")
                    )


def end_instance(data_dir: Path, instance: str) -> int:
    """Kill every process of the machine *instance* and wait until it is gone. Return how many there were. Blocking.

    Raises:
        TimeoutError: one does not die within seconds (it hangs in the kernel).
    """
    ended = 0
    for found in find(data_dir):
        if found.instance == instance:
            _kill(found.pid, data_dir, instance)
            ended += 1
    return ended


def reference(pid: int) -> ProcessRef | None:
    """Return what identifies the living process *pid* for ever, or None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return ProcessRef(pid=pid, start_ticks=int(fields[19]), boot_id=boot_id)


def _kill(pid: int, data_dir: Path, instance: str) -> None:
    """Kill *pid* through a pidfd, having checked again that it is the machine: the pid may have been reused."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if any(found.pid == pid and found.instance == instance for found in find(data_dir)):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not select.select([pidfd], [], [], _KILL_SECS)[0]:
                raise TimeoutError(f"process {pid} of machine {instance} does not end although it was killed")
            with contextlib.suppress(ChildProcessError):  # an earlier agent's child: init reaps it
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
