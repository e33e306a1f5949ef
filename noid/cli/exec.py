"""``noid exec``: one command in a guest, as if it ran here."""

from __future__ import annotations

import os
import select

import click

from noid.cli.options import Command, call, resolved_vm, with_endpoint, with_json, with_vm
from noid.cli.output import show
from noid.client import exec_stream
from noid.client.errors import ConnectionFailed
from noid.core import wire
from noid.core.model import ExecRequest, checked_argv, checked_env

STDIN_FD, STDOUT_FD, STDERR_FD = 0, 1, 2
TIMED_OUT = 124
INTERRUPTED = 130


class _Failed(click.ClickException):
    exit_code = 125


class _AfterDashes(Command):
    """A command whose last words come after ``--`` and nowhere else, so that the guest's options are never ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta["noid.argv"] = args[cut + 1 :]
        return super().parse_args(ctx, args[:cut])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "-- COMMAND..."]


@click.command(
    "exec",
    cls=_AfterDashes,
    epilog="""
noid exec web -- uname -a
noid exec web -- sh -c 'echo $HOSTNAME'
tar c . | noid exec web -i -w /srv -- tar x
""",
)
@with_vm
@click.option("-e", "--env", multiple=True, metavar="KEY=VALUE", help="Set a variable; may be repeated.")
@click.option("-u", "--user", metavar="USER", help="Run as this user; the image's default if not given.")
@click.option("-w", "--workdir", metavar="DIR", help="Run in this directory; the user's home if not given.")
@click.option("-i", "--interactive", is_flag=True, help="Forward standard input, from a pipe or as it is typed.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECS", help="End it after that long.")
@with_json
@with_endpoint
@click.pass_context
def exec_(
    ctx: click.Context,
    name: str | None,
    name_option: str | None,
    env: tuple[str, ...],
    user: str | None,
    workdir: str | None,
    interactive: bool,
    timeout: float | None,
) -> int:
    """Run a command in a VM. Its output streams, its exit code is ours.

    Exit code 124: it took longer than --timeout. 125: the connection was lost, so nobody knows. 128+n: signal n.
    """
    argv: list[str] = ctx.meta["noid.argv"]
    if not argv:
        raise click.UsageError(f"no command. Write it after two dashes: noid exec {name or 'NAME'} -- uname -a")
    request = ExecRequest(
        argv=checked_argv(argv),
        env=checked_env(env),
        cwd=workdir,
        user=user,
        stdin=interactive,
        timeout_secs=timeout,
    )
    vm = resolved_vm(name, name_option)
    collected = {wire.STDOUT: bytearray(), wire.STDERR: bytearray()}

    def collect(channel: int, data: bytes) -> None:
        collected[channel] += data

    as_json = call().json
    try:
        result = exec_stream.run(
            call().endpoint,
            vm,
            request,
            on_output=collect if as_json else _write,
            stdin_fd=STDIN_FD if interactive else None,
        )
    except ConnectionFailed as error:
        raise _Failed(str(error)) from error
    except KeyboardInterrupt:
        return INTERRUPTED  # in silence, as the command itself would have ended here
    if as_json:
        show(_as_fields(result, collected), "")
    if result.truncated:
        click.echo("warning: output was truncated (exceeded 1MB limit)", err=True)
    if result.timed_out:
        click.echo("exec timed out", err=True)
        return TIMED_OUT
    if result.exit_code is None:
        raise _Failed(f"the server does not know how the command on {vm!r} ended. It may still run.")
    return result.exit_code & 0xFF


def _as_fields(result: wire.ExecResult, collected: dict[int, bytearray]) -> dict[str, object]:
    return {
        "exit_code": result.exit_code,
        "signal": result.signal,
        "timed_out": result.timed_out,
        "truncated": result.truncated,
        "stdout": collected[wire.STDOUT].decode("utf-8", "replace"),
        "stderr": collected[wire.STDERR].decode("utf-8", "replace"),
    }


def _write(channel: int, data: bytes) -> None:
    """Write *data* at once and completely. Waiting for a slow reader is what slows the guest's process down, too."""
    descriptor = STDOUT_FD if channel == wire.STDOUT else STDERR_FD
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # somebody who shares this terminal or pipe has made it non-blocking
            select.select([], [descriptor], [])
