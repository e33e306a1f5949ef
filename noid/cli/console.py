"""``noid console``: a VM's serial console in this terminal, which is given back as it was, whatever happens."""

from __future__ import annotations

import os
import sys

import click

from noid.cli import terminal, ways_out
from noid.cli.options import call, command, resolved_vm, with_vm
from noid.cli.output import show
from noid.cli.screen import Screen, without_questions
from noid.cli.streams import write
from noid.client import console_stream
from noid.client.leaving import Leaving, WaysOut
from noid.client.terminal import Terminal
from noid.core import wire
from noid.core.model.processes import checked_env
from noid.errors import InvalidRequest

INTERRUPTED = 130
HELP = "~. leaves   ~~ types one ~   ~? is this"


@command(
    examples="""
noid console web
noid console web --detach-keys 'ctrl-p,ctrl-q ~.'
noid console web --readonly
echo dmesg | noid console web
""",
)
@with_vm
@click.option("-e", "--env", multiple=True, metavar="K=V", help="Type an export of it at the shell's prompt first.")
@click.option("--readonly", is_flag=True, help="Watch only; Ctrl+C ends it.")
@click.option(
    "--history", type=click.IntRange(min=0), metavar="BYTES", help="Begin with that much of what was printed."
)
@click.option("--detach-keys", "ways", metavar="WAYS", help=f"What leaves.  [default: {ways_out.DEFAULT}]")
def console(
    name: str | None,
    name_option: str | None,
    env: tuple[str, ...],
    readonly: bool,
    history: int | None,
    ways: str | None,
) -> int:
    """Open a VM's serial console in this terminal.

    Several may watch and type at once. From a pipe, what is read is typed; a second after the end of both input and
    output it detaches.
    """
    return open_console(resolved_vm(name, name_option), env, readonly=readonly, history=history, ways=ways)


def open_console(
    vm: str, env: tuple[str, ...], *, readonly: bool = False, history: int | None = None, ways: str | None = None
) -> int:
    """Be at the console of *vm* until the user leaves, and return the exit code. *env* are ``KEY=VALUE`` to export.

    Raises:
        click.UsageError: an entry of *env* cannot be typed, or *ways* out are none.
        NoidError: it could not be attached to, or the agent ended it.
    """
    prelude = _prelude(env)
    is_terminal = os.isatty(terminal.STDIN_FD) and not readonly
    leave_by = ways_out.chosen(ways) if is_terminal or ways is not None else WaysOut()
    screen = Screen()

    def on_output(data: bytes) -> None:
        screen.feed(data)
        write(wire.STDOUT, data)

    def on_attached() -> None:
        told = ways_out.told(leave_by) if is_terminal else "Press Ctrl+C to detach." if readonly else ""
        _say(f"Attached to '{vm}' serial console.\n{told}", raw=is_terminal)

    def on_notice(text: str) -> None:
        _say(f"\n[{text}]", raw=is_terminal)

    def on_history(data: bytes) -> None:
        on_output(without_questions(data) if is_terminal else data)

    with terminal.raw(is_terminal, screen) as wakeup_fd:
        front = console_stream.Front(
            on_output=on_output,
            on_history=on_history,
            on_notice=on_notice,
            input_fd=None if readonly else terminal.STDIN_FD,
            terminal=Terminal(size=terminal.size, wakeup_fd=wakeup_fd, keys=b"") if is_terminal else None,
            leaving=Leaving(leave_by) if is_terminal else None,
            on_help=lambda: on_notice(HELP),
            words_count=lambda: not screen.is_alternate,
        )
        try:
            console_stream.attach(call().endpoint, vm, front, on_attached=on_attached, history=history, prelude=prelude)
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            if is_terminal:
                write(wire.STDOUT, screen.undo())
                _say("", raw=True)  # a line of its own for whatever comes next
    if is_terminal:
        _say("--- Detached ---")
    if call().json:
        show({"name": vm, "detached": True}, "")
    return 0


def _prelude(entries: tuple[str, ...]) -> console_stream.Prelude | None:
    """Return what exports *entries* in the shell at the console, as the predecessor did, and shows when it has.

    The blank before each command keeps it out of the history of shells that are told to.
    """
    if not entries:
        return None
    try:
        env = checked_env(entries)
        for key, value in env.items():
            if not value.isprintable():
                raise InvalidRequest(f"the value of {key} has characters that cannot be typed at a console.")
    except InvalidRequest as error:
        raise click.UsageError(str(error)) from error
    typed = [f" export {key}={_quoted(value)}\r" for key, value in env.items()]
    number = os.urandom(8).hex()
    typed.append(f" echo __NOID_ENV''_SYNC_{number}__\r")  # what is echoed as it is typed is not yet what is meant
    return console_stream.Prelude(
        keys="".join(typed).encode("utf-8", "surrogateescape"),
        mark=f"__NOID_ENV_SYNC_{number}__".encode(),
        missing="no shell has confirmed the variables. Is one at its prompt there?",
    )


def _quoted(value: str) -> str:
    escaped = value.replace("'", "'\\''")
    return f"'{escaped}'"


def _say(text: str, *, raw: bool = False) -> None:
    """Tell the person, on stderr, which is not the guest's. A *raw* terminal does not return at the end of a line."""
    text = text.rstrip("\n") + "\n"
    sys.stderr.write(text.replace("\n", "\r\n") if raw else text)
    sys.stderr.flush()
