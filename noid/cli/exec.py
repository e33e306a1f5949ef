"""``noid exec``: one command in a guest, as if it ran here."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from noid.cli import terminal
from noid.cli.options import Command, call, command, resolved_vm, with_vm
from noid.cli.output import show
from noid.cli.streams import write
from noid.client import exec_stream
from noid.client.calls import processes
from noid.client.errors import ConnectionFailed
from noid.client.terminal import Terminal
from noid.core import wire
from noid.core.model import ExecRequest, TerminalSize, checked_argv, checked_env

TIMED_OUT = 124
INTERRUPTED = 130


class Failed(click.ClickException):
    """Nobody knows how the command fares."""

    exit_code = 125


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
    """How a command shall run in a guest: what `with_exec_options` adds to a command of ours."""

    env: tuple[str, ...]
    user: str | None
    workdir: str | None
    interactive: bool
    tty: bool
    keys: bytes
    timeout_secs: float | None

    @property
    def takes_input(self) -> bool:
        """Whether our standard input is forwarded."""
        return self.interactive or self.tty


def with_exec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how a command runs in a guest. The command gets them as *options*, `ExecOptions`."""

    def gathered(**values: Any) -> Any:
        given = {field.name: values.pop(field.name) for field in dataclasses.fields(ExecOptions)}
        return command(options=ExecOptions(**given), **values)

    wrapped: Callable[..., Any] = functools.update_wrapper(gathered, command)
    for option in reversed(
        (
            click.option("-e", "--env", multiple=True, metavar="KEY=VALUE", help="Set a variable; may be repeated."),
            click.option("-u", "--user", metavar="USER", help="Run as this user; the image's default if not given."),
            click.option("-w", "--workdir", metavar="DIR", help="Run in this directory; the user's home if not given."),
            click.option(
                "-i", "--interactive", is_flag=True, help="Forward standard input, from a pipe or as it is typed."
            ),
            click.option("-t", "--tty", is_flag=True, help="Give it this terminal; implies -i."),
            terminal.with_detach_keys("ctrl-p,ctrl-q", help_text="What leaves it running, with -t."),
            click.option(
                "--timeout",
                "timeout_secs",
                type=click.FloatRange(min=0, min_open=True),
                metavar="SECS",
                help="End it after that long.",
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped


@command(
    "exec",
    cls=AfterDashes,
    examples="""
noid exec web -- uname -a
noid exec web -- sh -c 'echo $HOSTNAME'
tar c . | noid exec web -i -w /srv -- tar x
noid exec web -t -- bash       leave it running with ctrl-p ctrl-q
noid exec web -d -- make all   then: noid ps web, noid attach web PROCESS
""",
)
@with_vm
@with_exec_options
@click.option("-d", "--detach", is_flag=True, help="Start it, print its id and let it run on.")
def exec_(name: str | None, name_option: str | None, options: ExecOptions, detach: bool) -> int:
    """Run a command in a VM. Its output streams, its exit code is ours.

    Exit code 124: it took longer than --timeout. 125: the connection was lost, so nobody knows. 128+n: signal n.
    """
    argv = guest_command()
    if not argv:
        raise click.UsageError(f"no command. Write it after two dashes: noid exec {name or 'NAME'} -- uname -a")
    vm = resolved_vm(name, name_option)
    if detach:
        _require(
            not (options.takes_input or options.timeout_secs),
            "-d starts a command nobody waits for: not with -i, -t, --timeout.",
        )
    request = requested(argv, options)
    if detach:
        process = call().perform(processes.start(vm, wire.request_to_json(request)))
        show(process, process["id"], brief=process["id"])
        return 0
    return execute(vm, request, options)


def guest_command() -> list[str]:
    """Return what came after the two dashes of the command that is running, an `AfterDashes`."""
    argv: list[str] = click.get_current_context().meta["noid.argv"]
    return argv


def requested(argv: list[str], options: ExecOptions) -> ExecRequest:
    """Return what to ask an agent for.

    Raises:
        click.UsageError: the options do not go together, or not with this terminal.
        InvalidRequest: no guest can run that.
    """
    if options.tty:
        _require(os.isatty(terminal.STDIN_FD), "-t needs a terminal, and standard input is none. Use -i for a pipe.")
        _require(not call().json, "-t shows a terminal, which --json cannot.")
    env = checked_env(options.env)
    return ExecRequest(
        argv=checked_argv(argv),
        env=_with_terminal_name(env) if options.tty else env,
        cwd=options.workdir,
        user=options.user,
        stdin=options.takes_input,
        timeout_secs=options.timeout_secs,
        tty=TerminalSize(**dict(zip(("columns", "rows"), terminal.size(), strict=True))) if options.tty else None,
    )


def execute(vm: str, request: ExecRequest, options: ExecOptions) -> int:
    """Run *request* in *vm* with our standard streams, and return the exit code to end with.

    Raises:
        click.ClickException: with 125: nobody knows how it fares.
        NoidError: the agent refused.
    """
    as_json = call().json
    collected = {wire.STDOUT: bytearray(), wire.STDERR: bytearray()}

    def collect(channel: int, data: bytes) -> None:
        collected[channel] += data

    try:
        with terminal.raw(options.tty) as wakeup_fd:
            conversation = exec_stream.Conversation(
                on_output=collect if as_json else write,
                on_gap=tell_gap,
                stdin_fd=terminal.STDIN_FD if options.takes_input else None,
                terminal=(
                    Terminal(size=terminal.size, wakeup_fd=wakeup_fd, keys=options.keys) if options.tty else None
                ),
            )
            result = exec_stream.run(call().endpoint, vm, request, conversation)
    except ConnectionFailed as error:
        raise Failed(str(error)) from error
    except KeyboardInterrupt:
        return INTERRUPTED  # in silence, as the command itself would have ended here
    if result is None:
        left = conversation.process
        click.echo(
            f"Detached; it runs on. Go back with: noid attach {vm} {left.process if left else 'PROCESS'}", err=True
        )
        return 0
    if as_json:
        show(_as_fields(result, collected), "")
    return exit_code(result, vm)


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
