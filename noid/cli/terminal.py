"""The terminal a command runs in: handed to a guest key by key, and given back as it was, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import tty
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from noid.client.terminal import parsed_keys
from noid.errors import InvalidRequest

if TYPE_CHECKING:
    from noid.cli.screen import Screen

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
def raw(is_terminal: bool, screen: Screen | None = None) -> Iterator[int | None]:
    """Hand every key to the guest while the block runs. Yield what becomes readable when the terminal was resized.

    However the block ends, also by a signal that can be caught, the terminal is as it was, and what the guest has
    switched on in it according to *screen* is switched off. While we are stopped, too, it is as it was. Without a
    terminal, nothing is done and None is yielded.
    """
    if not is_terminal:
        yield None
        return
    before = termios.tcgetattr(STDIN_FD)

    def set_raw() -> None:
        with contextlib.suppress(termios.error):  # it hung up
            tty.setraw(STDIN_FD, termios.TCSANOW)  # what was typed ahead is not thrown away

    def restore() -> None:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(STDIN_FD, termios.TCSANOW, before)

    def give_back() -> None:
        restore()
        if screen is not None and os.isatty(STDOUT_FD):
            with contextlib.suppress(OSError):  # it hung up
                os.write(STDOUT_FD, screen.undo())

    def end(signo: int, _: FrameType | None) -> None:
        give_back()  # here too: a second signal may interrupt the ``finally`` that the first one leads to
        raise SystemExit(128 + signo)  # by way of every ``finally``, with the code a shell shows for a signal

    def stop(_: int, __: FrameType | None) -> None:
        restore()
        os.kill(os.getpid(), signal.SIGSTOP)  # SIGCONT then makes it raw again

    def resume(_: int, __: FrameType | None) -> None:
        set_raw()  # the shell that had the terminal meanwhile has set its own mode

    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    handlers = {signo: signal.signal(signo, end) for signo in _ENDING}
    handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: None)
    stopped, continued = signal.signal(signal.SIGTSTP, stop), signal.signal(signal.SIGCONT, resume)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        set_raw()
        yield reader
    finally:
        signal.signal(signal.SIGTSTP, stopped)
        signal.signal(signal.SIGCONT, continued)
        give_back()
        for signo, handler in handlers.items():
            signal.signal(signo, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(reader)
        os.close(writer)


def with_detach_keys(default: str, *, help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option ``--detach-keys``, the parameter ``keys`` of a command: the bytes a terminal sends for them."""
    return click.option(
        "--detach-keys", "keys", type=_Keys(), default=default, show_default=True, metavar="KEYS", help=help_text
    )


def spelled(keys: bytes) -> str:
    """Return *keys* as they are named to a person."""
    return " ".join(f"Ctrl+{chr(key | 0x40)}" if key < 0x20 else repr(chr(key)) for key in keys)


class _Keys(click.ParamType[bytes]):
    """Keys as people write them; nothing at all for none."""

    name = "keys"

    def convert(self, value: str | bytes, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Return the bytes a terminal sends for them."""
        if isinstance(value, bytes):
            return value
        try:
            return parsed_keys(value)
        except InvalidRequest as error:
            self.fail(str(error), param, ctx)
