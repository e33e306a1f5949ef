"""The ``noid`` command: finds the subcommand, runs it, turns every way of ending into text and an exit code.

========  ===========================================================================
exit code meaning
========  ===========================================================================
0         done
1         it failed; ``Error:`` on stderr says why and what to try
2         used wrongly
124, 125  what runs a guest's command only: timed out; noid failed, or nobody knows
130       interrupted with Ctrl+C
141       whoever read the output has gone away
other     what runs a guest's command only: the guest's
========  ===========================================================================

Subcommands are imported when they are used, from `COMMANDS`: starting fast is a feature.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from noid import __version__
from noid.cli.options import Call, Group, common_options
from noid.errors import NoidError

COMMANDS = {
    "create": "noid.cli.vms:create",
    "list": "noid.cli.vms:list_",
    "info": "noid.cli.vms:info",
    "exec": "noid.cli.exec:exec_",
    "ps": "noid.cli.processes:ps",
    "attach": "noid.cli.processes:attach",
    "wait": "noid.cli.processes:wait",
    "kill": "noid.cli.processes:kill",
    "console": "noid.cli.console:console",
    "logs": "noid.cli.logs:logs",
    "cp": "noid.cli.cp:cp",
    "checkpoint": "noid.cli.checkpoints:checkpoint",
    "checkpoints": "noid.cli.checkpoints:checkpoints",
    "restore": "noid.cli.checkpoints:restore",
    "rm": "noid.cli.checkpoints:rm",
    "label": "noid.cli.labels:label",
    "rename": "noid.cli.vms:rename",
    "stop": "noid.cli.power:stop",
    "start": "noid.cli.power:start",
    "reboot": "noid.cli.power:reboot",
    "pause": "noid.cli.power:pause",
    "resume": "noid.cli.power:resume",
    "destroy": "noid.cli.vms:destroy",
    "use": "noid.cli.account:use",
    "current": "noid.cli.account:current",
    "whoami": "noid.cli.account:whoami",
    "auth": "noid.cli.auth:auth",
    "config": "noid.cli.config:config",
    "version": "noid.cli.update:version",
    "update": "noid.cli.update:update",
    "bench": "noid_bench.command:bench",
}
FORM = " (single file)" if hasattr(getattr(__spec__, "loader", None), "archive") else ""

NOT_FOUND = 404
INTERRUPTED = 130
READER_GONE = 141


class LazyGroup(Group):
    """A group that knows its commands by name and imports one when it is asked for it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order people meet them."""
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, importing its module."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)  # noqa: S101  # a static table of ours
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Let ``noid help exec`` mean ``noid exec --help``."""
        if args == ["help"]:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().resolve_command(ctx, [*args[1:], "--help"] if args[0] == "help" else args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""
noid create web                 make a VM; without a server configured, on this machine
noid exec web -- ls /           run a command in it
noid checkpoint web             freeze it: memory, processes, disk
noid restore web ID --as copy   wake a second one where the first was frozen
""",
)
@click.version_option(f"{__version__}{FORM}", "-V", "--version", prog_name="noid", message="%(prog)s %(version)s")
def cli() -> None:
    """Virtual machines that can be frozen, forked and woken in milliseconds."""


cli.params += common_options()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    _open_standard_streams()
    code = run(args)
    sys.exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line with *args*, the process' own if None, and return its exit code."""
    # Not cli.main(), which has its own ideas about a closed pipe.
    invocation = Call()
    try:
        with cli.make_context("noid", list(sys.argv[1:] if args is None else args), obj=invocation) as ctx:
            outcome = cli.invoke(ctx)
        _flush()
        return outcome if isinstance(outcome, int) else 0
    except click.exceptions.Exit as ending:
        _flush()
        return ending.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except NoidError as error:
        _complain(f"{error}{_next_step(error)}")
        return invocation.fails_with
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted. What the server has begun it finishes; look with: noid list", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        return _silence(READER_GONE)
    except Exception as error:  # the last resort: a bug must not look like anything else
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF):
            _complain(f"cannot write the output: {error.strerror}.")
            return _silence(invocation.fails_with)
        if _verbose():
            raise
        _complain(
            f"this is a bug in noid {__version__}: {type(error).__name__}: {error}\n"
            "Please report it with the output of the same command under NOID_VERBOSE=1."
        )
        return invocation.fails_with


def _next_step(error: NoidError) -> str:
    """Return what to type after an answer whose words are the wire's: a name that is not there."""
    if getattr(error, "status", None) != NOT_FOUND:
        return ""
    if "checkpoint '" in str(error):
        return ". See which there are with: noid checkpoints NAME"
    return ". See which there are with: noid list" if ": VM '" in str(error) else ""


def _flush() -> None:
    if sys.stdout is not None:  # it is None if it was closed when we began
        sys.stdout.flush()


def _complain(text: str) -> None:
    click.echo(f"Error: {text}", err=True)


def _verbose() -> bool:
    return os.environ.get("NOID_VERBOSE", "").strip().lower() in ("1", "true", "yes", "on")


def _silence(code: int) -> int:
    """Point stdout nowhere, so that Python's last flush has nothing to complain about, and return *code*."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _open_standard_streams() -> None:
    """Make sure that 0, 1 and 2 are taken, or the first socket or file we open would become our stdin or stdout."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    main()
