"""``noid console``: a VM's serial console in this terminal, which is given back as it was, whatever happens."""

from __future__ import annotations

import os
import sys

import click

from noid.cli import terminal
from noid.cli.options import call, command, resolved_vm, with_vm
from noid.cli.output import show
from noid.cli.streams import write
from noid.client import console_stream
from noid.client.terminal import Terminal
from noid.core import wire

INTERRUPTED = 130


@command(
    examples="""
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
@terminal.with_detach_keys("ctrl-]", help_text="What leaves.")
def console(name: str | None, name_option: str | None, readonly: bool, history: int | None, keys: bytes) -> int:
    """Open a VM's serial console in this terminal.

    Several may watch and type at once. From a pipe, what is read is typed; a second after the end of both input and
    output it detaches.
    """
    vm = resolved_vm(name, name_option)
    is_terminal = os.isatty(terminal.STDIN_FD) and not readonly

    def on_attached() -> None:
        how = (
            f"Leave with {terminal.spelled(keys)}."
            if is_terminal and keys
            else "Leave with Ctrl+C."
            if readonly
            else ""
        )
        _say(f"Attached to the serial console of {vm!r}. {how}".rstrip() + "\r" * is_terminal)

    with terminal.raw(is_terminal) as wakeup_fd:
        try:
            console_stream.attach(
                call().endpoint,
                vm,
                input_fd=None if readonly else terminal.STDIN_FD,
                terminal=Terminal(size=terminal.size, wakeup_fd=wakeup_fd, keys=keys) if is_terminal else None,
                on_output=lambda data: write(wire.STDOUT, data),
                on_notice=lambda text: _say(f"\r\n[{text}]\r"),
                on_attached=on_attached,
                history=history,
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


def _say(text: str) -> None:
    """Tell the person, on stderr, which is not the guest's."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
