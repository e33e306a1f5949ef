"""A VMM as a process: started so that it outlives noid, watched and ended through a pidfd, adopted after a restart."""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from noid.core.model.vms import ProcessRef
from noid.errors import NotFound


class VmmProcess:
    """One process, ours or an earlier agent's. *exit_text* says how it ended, where that can be known."""

    def __init__(self, ref: ProcessRef, pidfd: int) -> None:
        self.ref = ref
        self.exit_text: str | None = None
        self.exit_signal: int | None = None
        self._pidfd = pidfd

    @classmethod
    def spawn(
        cls,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_path: Path,
        pass_fds: Sequence[int],
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        directory: Path = Path("/"),
    ) -> VmmProcess:
        """Start *argv* in a session of its own, with its errors, and output without a *stdout*, added to *log_path*.

        *directory* is where the process works, and so keeps busy for as long as it lives.

        Takes 0.2 ms, so it happens on the event loop: no cancellation can come between the process and its pidfd.

        Raises:
            FileNotFoundError: there is no such program.
            OSError: anything else; no process is left.
        """
        log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            # Files, not pipes: a pipe breaks when noid ends. No preexec_fn, no user=: they cost the vfork.
            popen = subprocess.Popen(
                list(argv),
                env=dict(environment),
                cwd=directory,
                stdin=stdin,
                stdout=log_fd if stdout is None else stdout,
                stderr=log_fd,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )
        finally:
            os.close(log_fd)
        pidfd = os.pidfd_open(popen.pid)  # a child nobody has reaped: the pid cannot be somebody else's
        popen.returncode = 0  # reaped through the pidfd below; Popen is neither to wait for it nor to warn
        return cls(ProcessRef(pid=popen.pid, start_ticks=start_ticks(popen.pid), boot_id=boot_id()), pidfd)

    @classmethod
    def adopt(cls, ref: ProcessRef) -> VmmProcess:
        """Take hold of a process that is already there.

        Raises:
            NotFound: it has ended, or its pid now belongs to another process.
        """
        gone = NotFound(f"the VM's process {ref.pid} is gone.")
        if ref.boot_id != boot_id():
            raise gone
        try:
            pidfd = os.pidfd_open(ref.pid)
        except ProcessLookupError as error:
            raise gone from error
        try:
            # Compared after the pidfd is open: from here on the pid cannot change hands unnoticed.
            if start_ticks(ref.pid) != ref.start_ticks or _has_ended(pidfd):
                raise gone
        except OSError as error:
            os.close(pidfd)
            raise gone from error
        except NotFound:
            os.close(pidfd)
            raise
        return cls(ref, pidfd)

    async def wait(self) -> None:
        """Return when the process has ended; a child of ours is reaped. Any number of tasks may wait."""
        if self._pidfd < 0:
            raise NotFound(f"noid has let go of process {self.ref.pid}.")
        own_fd = os.dup(self._pidfd)  # trio lets one task wait for one descriptor
        try:
            # Looked at after each wake-up: a cancelled wait on a duplicate leaves epoll watching the old number for a
            # hang-up, and whoever gets that number next is woken in its stead.
            while not _has_ended(own_fd):
                await trio.lowlevel.wait_readable(own_fd)
            self._reap(own_fd)
        finally:
            os.close(own_fd)

    @property
    def is_let_go(self) -> bool:
        """Whether `close` was called."""
        return self._pidfd < 0

    def has_ended(self) -> bool:
        """Whether the process has ended; true of one that was let go, since it is not ours to say more."""
        return self._pidfd < 0 or _has_ended(self._pidfd)

    def send_kill(self) -> None:
        """Send SIGKILL; whoever waits learns of the end. Does nothing to a process that has ended."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return

    def close(self) -> None:
        """Let go without ending the process. Tasks that wait already go on waiting."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _reap(self, pidfd: int) -> None:
        try:
            result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return  # not our child, or another task was first
        if result is None:
            return
        if result.si_code == os.CLD_EXITED:
            self.exit_text = f"exit status {result.si_status}"
        else:
            self.exit_signal = result.si_status
            self.exit_text = f"signal {result.si_status} ({signal.Signals(result.si_status).name})"


@functools.cache
def boot_id() -> str:
    """Return what tells one boot of this host from another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int:
    """Return when process *pid* started, in clock ticks since boot.

    Raises:
        OSError: there is no such process.
    """
    # Field 22; the second field is a name in parentheses that may contain anything, so counting begins behind it.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
