"""The serial line as files: what the guest prints is appended to a log, what is typed comes out of a named pipe.

Both are the VMM's standard input and output, so no VMM has to open anything. A file takes whatever is
printed, so nobody can hold the guest up. The VMM itself holds a writing end of the pipe for all its life: who types may
come and go, and die, and never is there an end of input.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.errors import DependencyDown

CONSOLE_LOG = "serial.log"
CONSOLE_INPUT = "console.in"
#: What the pipe holds that the guest has not read: little, so that whoever types soon notices.
UNREAD_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleFiles:
    """The descriptors a VMM is started with."""

    stdin: int
    stdout: int


@contextlib.contextmanager
def opened(log: Path, pipe: Path) -> Iterator[ConsoleFiles]:
    """Yield the descriptors for a new process. *log* is gone on with, *pipe* is made anew: nothing waits in it."""
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe, 0o600)
    with contextlib.ExitStack() as stack:
        # Reading and writing, which on Linux neither waits for the other end nor ever sees it closed.
        stdin = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, stdin)
        fcntl.fcntl(stdin, fcntl.F_SETPIPE_SZ, UNREAD_BYTES)
        # Appending, so that nothing done to the file from outside makes the VMM write into the middle of it.
        stdout = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        stack.callback(os.close, stdout)
        yield ConsoleFiles(stdin=stdin, stdout=stdout)


def connected(pipe: Path) -> trio.abc.SendStream:
    """Return a writing end of *pipe*.

    Raises:
        DependencyDown: nobody reads there: the VMM has ended, or was started without such a pipe.
    """
    try:
        fd = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise DependencyDown(
            "nothing can be typed on the console of this VM: its machine has ended, or an earlier version of noid "
            "started it. What it has printed can be read. If it still runs, restore it from a checkpoint, or stop and "
            "start it, to get a console."
        ) from error
    except OSError as error:  # ENXIO: there is no reader
        raise DependencyDown(
            f"the serial console of this VM takes no input ({error.strerror}): its machine has ended."
        ) from error
    return trio.lowlevel.FdStream(fd)
