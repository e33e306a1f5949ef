"""``noid exec``: one command in a guest, as if it ran here; and the options of all commands that run one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from noid.cli import interrupts, standard_input, terminal
from noid.cli.env_entries import environment
from noid.cli.options import Command, call, command, resolved_vm, with_vm
from noid.cli.output import show, show_timing
from noid.cli.streams import write
from noid.client import exec_stream
from noid.client.calls import processes
from noid.client.errors import ServerTooOld
from noid.client.terminal import Terminal
from noid.core import wire
from noid.core.model.processes import ExecRequest, TerminalSize, checked_argv
from noid.errors import InvalidRequest

if TYPE_CHECKING:
    from noid.cli.screen import Screen

TIMED_OUT = 124
FAILED = 125
INTERRUPTED = 130


class Failed(click.ClickException):
    """Nobody knows how the command fares."""

    exit_code = FAILED


class AfterDashes(Command):
    """A command whose last words come after ``--`` and nowhere else, so that the guest's options are never ours.

    `guest_command` returns them.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take them away before click sees them."""
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta["noid.argv"] = args[cut + 1 :]
        return super().parse_args(ctx, args[:cut])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Say so."""
        return [*super().collect_usage_pieces(ctx), "-- COMMAND..."]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecOptions:
    """How a command shall run in a guest: what `with_exec_options` adds to a command of ours.

    Attributes:
        interactive, no_stdin: Whether standard input shall be forwarded, or not; neither where nobody said.
        keys: What leaves a command that has a terminal.
    """

    env: tuple[str, ...]
    env_file: tuple[str, ...]
    user: str | None
    workdir: str | None
    interactive: bool
    no_stdin: bool
    tty: bool
    keys: bytes
    timeout_secs: float | None


_NOTHING_SAID = ExecOptions(
    env=(), env_file=(), user=None, workdir=None, interactive=False, no_stdin=False, tty=False, keys=b"",
    timeout_secs=None,
)  # fmt: skip


def with_exec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how a command runs in a guest. The command gets them as *options*, `ExecOptions`.

    Whatever of noid's own fails in it ends with `FAILED`, which no guest's exit code is taken for.
    """

    def gathered(*args: Any, **values: Any) -> Any:
        call().fails_with = FAILED
        given = {field.name: values.pop(field.name) for field in dataclasses.fields(ExecOptions)}
        return command(*args, options=ExecOptions(**given), **values)

    wrapped: Callable[..., Any] = functools.update_wrapper(gathered, command)
    for option in reversed(
        (
            click.option("-e", "--env", multiple=True, metavar="K[=V]", help="Set a variable, or pass ours on."),
            click.option("--env-file", multiple=True, type=click.Path(), metavar="FILE",
                         help="Set those in a file, one a line."),
            click.option("-u", "--user", metavar="USER", help="Run as this user, not the image's default."),
            click.option("-w", "--workdir", metavar="DIR", help="Run in this directory, not the user's home."),
            click.option("-i", "--interactive", is_flag=True, help="Forward our input, whatever it is."),
            click.option("-n", "--no-stdin", is_flag=True, help="Do not, also if it is a pipe of ours alone."),
            click.option("-t", "--tty", is_flag=True, help="Give it this terminal, and our input."),
            terminal.with_detach_keys("ctrl-p,ctrl-q", help_text="Leave it running, with -t."),
            click.option("--timeout", "timeout_secs", type=click.FloatRange(min=0, min_open=True), metavar="SECS",
                         help="End it after that long."),
        )
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


@command(
    "exec",
    cls=AfterDashes,
    examples="""
noid exec web -- sh -c 'echo $HOSTNAME'
tar c . | noid exec web -w /srv -- tar x
noid exec web -d -- make all    then: noid ps web, noid attach web PROCESS
""",
)
@with_vm
@with_exec_options
@click.option("-d", "--detach", is_flag=True, help="Start it, print its id and let it run on.")
def exec_(name: str | None, name_option: str | None, options: ExecOptions, detach: bool) -> int:
    """Run a command in a VM; its exit code is ours. Without one, open the console.

    A pipe or file that noid alone reads is its input; that of a loop around it is not, without -i. Exit code 124: it
    took too long. 125: noid failed.
    """
    argv = guest_command()
    vm = resolved_vm(name, name_option)
    if not argv:
        _require(
            not detach and options == dataclasses.replace(_NOTHING_SAID, env=options.env, keys=options.keys),
            f"no command. Write it after two dashes: noid exec {vm} -- uname -a",
        )
        from noid.cli.console import open_console

        return open_console(vm, options.env)
    if not detach:
        return execute(vm, requested(argv, options), options)
    _require(
        not (options.interactive or options.tty or options.timeout_secs),
        "-d starts a command nobody waits for: not with -i, -t, --timeout.",
    )
    request = requested(argv, dataclasses.replace(options, no_stdin=True))
    process = call().perform(processes.start(vm, wire.request_to_json(request)))
    show(process, process["id"], brief=process["id"])
    return 0


def guest_command() -> list[str]:
    """Return what came after the two dashes of the command that is running, an `AfterDashes`."""
    argv: list[str] = click.get_current_context().meta["noid.argv"]
    return argv


def requested(argv: list[str], options: ExecOptions) -> ExecRequest:
    """Return what to ask an agent for. Input that may have been meant for it and is left alone is told of on stderr.

    Raises:
        click.UsageError: the options do not go together, or not with this terminal; or a variable is none.
        InvalidRequest: no guest can run that.
    """
    if options.tty:
        _require(os.isatty(terminal.STDIN_FD), "-t needs a terminal, and standard input is none.")
        _require(not call().json, "-t shows a terminal, which --json cannot.")
    _require(not (options.no_stdin and (options.interactive or options.tty)), "-n forwards no input: not with -i, -t.")
    try:
        env = environment(options.env_file, options.env)
    except InvalidRequest as error:
        raise click.UsageError(str(error)) from error
    return ExecRequest(
        argv=checked_argv(argv),
        env=_with_terminal_name(env) if options.tty else env,
        cwd=options.workdir,
        user=options.user,
        stdin=_takes_input(options),
        timeout_secs=options.timeout_secs,
        tty=TerminalSize(**dict(zip(("columns", "rows"), terminal.size(), strict=True))) if options.tty else None,
    )


def _takes_input(options: ExecOptions) -> bool:
    if options.no_stdin:
        return False
    if options.interactive or options.tty or standard_input.is_meant_for_us():
        return True
    if standard_input.has_waiting() and not call().quiet:
        click.echo(
            "Standard input was left to the script around this command, which reads it too. -i takes it, -n says that "
            "this is meant.",
            err=True,
        )
    return False


def execute(
    vm: str, request: ExecRequest, options: ExecOptions, *, on_detach: Callable[[], None] = lambda: None
) -> int:
    """Run *request* in *vm* with our standard streams, and return the exit code to end with.

    *on_detach* is called if the user leaves the command running.

    Raises:
        click.ClickException: with 125: nobody knows how it fares.
        NoidError: it could not be run, or nobody knows how it fares.
    """
    try:
        return _execute(vm, request, options, on_detach)
    except ServerTooOld as error:
        from noid.client.predecessor import INPUT

        if options.interactive or error.deed != INPUT:
            raise
    # Nobody said that our input is the command's. That server gives it none, which scripts made for it rely on.
    if standard_input.has_waiting() and not call().quiet:
        click.echo("Standard input was left alone: that server cannot give a command input.", err=True)
    return _execute(vm, dataclasses.replace(request, stdin=False), options, on_detach)


def _execute(vm: str, request: ExecRequest, options: ExecOptions, on_detach: Callable[[], None]) -> int:
    as_json = call().json
    collected = {wire.STDOUT: bytearray(), wire.STDERR: bytearray()}

    def collect(channel: int, data: bytes) -> None:
        collected[channel] += data

    invocation = call()
    screen = on_output = None
    if options.tty:
        screen, on_output = _watched()

    def interrupt(signal_name: str) -> bool:
        if conversation.process is None:
            return False
        invocation.client.perform(processes.send_signal(vm, conversation.process.process, signal_name))
        return True

    marks = [time.perf_counter()]
    try:
        with terminal.raw(options.tty, screen) as wakeup_fd:
            conversation = exec_stream.Conversation(
                on_output=on_output or (collect if as_json else write),
                on_gap=tell_gap,
                on_started=lambda: marks.append(time.perf_counter()),
                stdin_fd=terminal.STDIN_FD if request.stdin else None,
                terminal=Terminal(size=terminal.size, wakeup_fd=wakeup_fd, keys=options.keys) if options.tty else None,
            )
            with contextlib.nullcontext() if options.tty else interrupts.passed_on(interrupt):
                result = exec_stream.run(invocation.endpoint, vm, request, conversation)
    except KeyboardInterrupt:
        return INTERRUPTED  # a second one: the agent ends the command
    if result is None:
        on_detach()
        left = conversation.process
        click.echo(
            f"Detached; it runs on. Go back with: noid attach {vm} {left.process if left else 'PROCESS'}", err=True
        )
        return 0
    marks.append(time.perf_counter())
    # A server that does not say when the command began, as those before 0.3.0, leaves one time.
    timings = {"start": marks[1] - marks[0], "run": marks[-1] - marks[1]} if len(marks) > 2 else {}
    if as_json:
        show(_as_fields(result, collected) | ({"timings": timings} if invocation.timing else {}), "")
    if invocation.timing:
        show_timing(timings, marks[-1] - marks[0], f"exec on {vm}")
    return exit_code(result, vm)


def _watched() -> tuple[Screen, Callable[[int, bytes], None]]:
    """Return what knows what the guest has switched on in our terminal, and what shows it output."""
    from noid.cli.screen import Screen

    screen = Screen()

    def show_all(channel: int, data: bytes) -> None:
        screen.feed(data)
        write(channel, data)

    return screen, show_all


def exit_code(result: wire.ExecResult, vm: str) -> int:
    """Return what a command that ended like this ends ours with, having said what a code cannot.

    Raises:
        click.ClickException: with 125: the server does not know.
    """
    if result.truncated:
        click.echo("warning: output was truncated (exceeded 1MB limit)", err=True)
    if result.timed_out:
        click.echo("exec timed out", err=True)
        return TIMED_OUT
    if result.exit_code is None:
        raise Failed(f"the server does not know how the command on {vm!r} ended. It may still run.")
    return result.exit_code & 0xFF


def tell_gap(size: int) -> None:
    """Say on stderr that output is missing."""
    click.echo(f"[{size} bytes of output are no longer kept]", err=True)


def _with_terminal_name(env: dict[str, str]) -> dict[str, str]:
    """Tell the guest's programs which terminal this is, as ssh does, unless the user says what it shall be."""
    name = os.environ.get("TERM")
    return {"TERM": name, **env} if name else env


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise click.UsageError(otherwise)


def _as_fields(result: wire.ExecResult, collected: dict[int, bytearray]) -> dict[str, object]:
    return {
        "exit_code": result.exit_code,
        "signal": result.signal,
        "timed_out": result.timed_out,
        "truncated": result.truncated,
        "stdout": collected[wire.STDOUT].decode("utf-8", "replace"),
        "stderr": collected[wire.STDERR].decode("utf-8", "replace"),
    }
