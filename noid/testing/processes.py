"""Processes as tests see them: who carries the mark of a data directory, and how to end them for sure."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from noid.core.model.vms import ProcessRef

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def process_ref(pid: int) -> ProcessRef | None:
    """Return the reference of a living process; None when there is none, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before may hold anything, even a ')'
    if state in "ZX":
        return None
    return ProcessRef(pid=pid, start_ticks=int(fields[18]), boot_id=_BOOT_ID.read_text().strip())


def marked_processes(data_dir: Path) -> dict[int, str]:
    """Return the living processes whose environment says ``NOID_DATA_DIR`` is *data_dir* or below, by pid.

    The value is the command line, for messages. A process of another user is not seen.
    """
    mark = b"NOID_DATA_DIR=" + os.fsencode(data_dir)
    found: dict[int, str] = {}
    for pid in _pids():
        with contextlib.suppress(OSError):  # it ended while we looked, or is not ours
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if any(entry == mark or entry.startswith(mark + b"/") for entry in entries) and process_ref(pid):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found[pid] = os.fsdecode(b" ".join(words)[:200])
    return found


def kill_marked(data_dir: Path, spare: frozenset[int] = frozenset()) -> dict[int, str]:
    """Kill the processes of *data_dir* until none is left, except *spare*, and return those that were there.

    What one of them starts meanwhile inherits the mark, so looking again finds it.
    """
    spare |= {os.getpid()}
    killed: dict[int, str] = {}
    while found := {pid: words for pid, words in marked_processes(data_dir).items() if pid not in spare}:
        killed |= found
        for pid in found:
            with contextlib.suppress(ProcessLookupError), _pidfd(pid) as fd:
                if pid in marked_processes(data_dir):  # still the same one, now that the descriptor pins it
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    _await_end(fd)
    return killed


def end(pid: int, signo: int, patience_secs: float) -> None:
    """Send *signo* to a process and wait until it has ended and its files and sockets are closed.

    Raises:
        TimeoutError: after *patience_secs*.
    """
    import select

    with contextlib.suppress(ProcessLookupError), _pidfd(pid) as fd:
        signal.pidfd_send_signal(fd, signo)
        if not select.select([fd], [], [], patience_secs)[0]:
            raise TimeoutError(f"process {pid} has not ended within {patience_secs:g} s of signal {signo}")
        reap(fd)


def reap(pidfd: int) -> os.waitid_result | None:
    """Take the exit status of an ended child, so that no zombie stays; None when it is not our child, or was reaped."""
    try:
        return os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())  # noqa: PTH208  # names are wanted


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _await_end(pidfd: int) -> None:
    import select

    select.select([pidfd], [], [], 5.0)  # a killed process that stays is stuck in the kernel: the next look tells
    reap(pidfd)
