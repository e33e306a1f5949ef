"""``noid console``: a VM's serial console in this terminal, which is given back as it was, whatever happens."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from types import FrameType

import click

from noid.cli.logs import write
from noid.cli.options import Command, call, resolved_vm, with_endpoint, with_json, with_vm
from noid.cli.output import show
from noid.client import console_stream
from noid.core import wire

STDIN_FD, STDOUT_FD = 0, 1
INTERRUPTED = 130
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_KEY = re.compile(r"ctrl-([a-z@\[\\\]^_])|(.)", re.ASCII | re.IGNORECASE)


class _DetachKeys(click.ParamType[bytes]):
    """Keys as people write them: ``ctrl-]``, ``ctrl-p,ctrl-q``, ``~,.``; nothing at all for none."""

    name = "keys"

    def convert(self, value: str | bytes, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Return the bytes a terminal sends for them."""
        if isinstance(value, bytes):
            return value
        keys = bytearray()
        for word in value.split(",") if value else ():
            found = _KEY.fullmatch(word)
            if found is None or not word.isascii():
                self.fail(f"{word!r} is no key. Write single characters or ctrl-X, separated by commas.", param, ctx)
            control, plain = found.groups()
            keys += bytes((ord(control.upper()) & 0x1F,)) if control else plain.encode()
        return bytes(keys)


@click.command(
    "console",
    cls=Command,
    epilog="""
noid console web
noid console web --detach-keys ctrl-p,ctrl-q
noid console web --readonly
echo dmesg | noid console web
""",
)
@with_vm
@click.option("--readonly", is_flag=True, help="Watch only; Ctrl+C ends it.")
@click.option(
    "--history", type=click.IntRange(min=0), metavar="BYTES", help="Begin with that much of what was printed."
)
@click.option(
    "--detach-keys",
    "keys",
    type=_DetachKeys(),
    default="ctrl-]",
    show_default=True,
    metavar="KEYS",
    help="What leaves.",
)
@with_json
@with_endpoint
def console(name: str | None, name_option: str | None, readonly: bool, history: int | None, keys: bytes) -> int:
    """Open a VM's serial console in this terminal.

    Several may watch and type at once. From a pipe, what is read is typed; a second after the end of both input and
    output it detaches.
    """
    vm = resolved_vm(name, name_option)
    is_terminal = os.isatty(STDIN_FD) and not readonly

    def on_attached() -> None:
        how = f"Leave with {_spelled(keys)}." if is_terminal and keys else "Leave with Ctrl+C." if readonly else ""
        _say(f"Attached to the serial console of {vm!r}. {how}".rstrip() + "\r" * is_terminal)

    with _terminal(is_terminal) as wakeup_fd:
        terminal = console_stream.Terminal(
            input_fd=None if readonly else STDIN_FD,
            on_output=lambda data: write(wire.STDOUT, data),
            on_notice=lambda text: _say(f"\r\n[{text}]\r"),
            size=_size if is_terminal else lambda: None,
            wakeup_fd=wakeup_fd,
        )
        try:
            console_stream.attach(
                call().endpoint,
                vm,
                terminal,
                keys=keys if is_terminal else b"",
                history=history,
                on_attached=on_attached,
            )
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            if is_terminal:
                _say("\r")  # a line of its own for whatever comes next
    if is_terminal:
        _say("Detached. The VM runs on.")
    if call().json:
        show({"name": vm, "detached": True}, "")
    return 0


@contextlib.contextmanager
def _terminal(is_terminal: bool) -> Iterator[int | None]:
    """Hand every key to the guest while the block runs. Yield what becomes readable when the terminal was resized.

    However the block ends, also by a signal that can be caught, the terminal is as it was.
    """
    if not is_terminal:
        yield None
        return
    before = termios.tcgetattr(STDIN_FD)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    handlers = {signo: signal.signal(signo, _end) for signo in _ENDING}

    def resume(_: int, __: FrameType | None) -> None:
        tty.setraw(STDIN_FD, termios.TCSANOW)  # the shell that had the terminal meanwhile has set its own mode

    handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, resume)
    handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        tty.setraw(STDIN_FD, termios.TCSANOW)  # what was typed ahead is not thrown away
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


def _size() -> tuple[int, int] | None:
    try:
        size = os.get_terminal_size(STDIN_FD)
    except OSError:  # a terminal that hung up
        return None
    return size.columns, size.lines


def _spelled(keys: bytes) -> str:
    return ", ".join(f"Ctrl+{chr(key | 0x40)}" if key < 0x20 else repr(chr(key)) for key in keys)


def _say(text: str) -> None:
    """Tell the person, on stderr, which is not the guest's."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
