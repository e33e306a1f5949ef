"""The terminal a command runs in: handed to a guest key by key, and given back as it was, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import tty
from collections.abc import Iterator
from types import FrameType

STDIN_FD, STDOUT_FD = 0, 1
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def size() -> tuple[int, int]:
    """Return columns and rows of the terminal, 80 and 24 where it does not say."""
    for fd in (STDOUT_FD, STDIN_FD):
        try:
            found = os.get_terminal_size(fd)
        except OSError:
            continue
        if found.columns and found.lines:
            return found.columns, found.lines
    return 80, 24


@contextlib.contextmanager
def raw(is_terminal: bool) -> Iterator[int | None]:
    """Hand every key to the guest while the block runs. Yield what becomes readable when the terminal was resized.

    However the block ends, also by a signal that can be caught, the terminal is as it was. Without one, nothing is done
    and None is yielded.
    """
    if not is_terminal:
        yield None
        return
    before = termios.tcgetattr(STDIN_FD)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    handlers = {signo: signal.signal(signo, _end) for signo in _ENDING}

    def resume(_: int, __: FrameType | None) -> None:
        tty.setraw(STDIN_FD)  # the shell that had the terminal meanwhile has set its own mode

    handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, resume)
    handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        tty.setraw(STDIN_FD)
        yield reader
    finally:
        signal.set_wakeup_fd(wakeup)
        for signo, handler in handlers.items():
            signal.signal(signo, handler)
        with contextlib.suppress(termios.error):  # it hung up
            termios.tcsetattr(STDIN_FD, termios.TCSANOW, before)
        os.close(reader)
        os.close(writer)


def _end(signo: int, _: FrameType | None) -> None:
    """Leave by way of every ``finally``, with the exit code a shell shows for a signal."""
    raise SystemExit(128 + signo)
