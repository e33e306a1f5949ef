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

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

import click

from noid import __version__
from noid.cli.options import Call, Group, common_options
from noid.errors import ConfigError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

SECTIONS = {
    "Machines": {
        "create": "noid.cli.vms:create",
        "list": "noid.cli.listing:list_",
        "info": "noid.cli.vms:info",
        "stop": "noid.cli.power:stop",
        "start": "noid.cli.power:start",
        "reboot": "noid.cli.power:reboot",
        "pause": "noid.cli.power:pause",
        "resume": "noid.cli.power:resume",
        "fork": "noid.cli.fork:fork",
        "destroy": "noid.cli.vms:destroy",
        "rename": "noid.cli.vms:rename",
        "label": "noid.cli.labels:label",
        "use": "noid.cli.account:use",
        "current": "noid.cli.account:current",
    },
    "Inside": {
        "run": "noid.cli.run:run",
        "exec": "noid.cli.exec:exec_",
        "ps": "noid.cli.processes:ps",
        "attach": "noid.cli.processes:attach",
        "wait": "noid.cli.wait:wait",
        "kill": "noid.cli.processes:kill",
        "console": "noid.cli.console:console",
        "logs": "noid.cli.logs:logs",
        "cp": "noid.cli.cp:cp",
        "port-forward": "noid.cli.forward:port_forward",
        "open": "noid.cli.forward:open_",
    },
    "Checkpoints": {
        "checkpoint": "noid.cli.checkpoints:checkpoint",
        "checkpoints": "noid.cli.checkpoints:checkpoints",
        "restore": "noid.cli.checkpoints:restore",
        "rm": "noid.cli.checkpoints:rm",
    },
    "Servers": {
        "auth": "noid.cli.auth:auth",
        "whoami": "noid.cli.account:whoami",
        "quota": "noid.cli.operations:quota",
        "operations": "noid.cli.operations:operations",
        "events": "noid.cli.events:events",
        "api": "noid.cli.api:api",
    },
    "More": {
        "doctor": "noid.cli.doctor:doctor",
        "completion": "noid.cli.completion:completion",
        "config": "noid.cli.config:config",
        "version": "noid.cli.update:version",
        "update": "noid.cli.update:update",
        "bench": "noid_bench.command:bench",
    },
}
"""Every command with where it is, under the headings and in the order of ``noid --help``."""

COMMANDS = {name: place for section in SECTIONS.values() for name, place in section.items()}

FORM = " (single file)" if hasattr(getattr(__spec__, "loader", None), "archive") else ""
INTERRUPTED = 130
READER_GONE = 141


class LazyGroup(Group):
    """A group that knows its commands by name and imports one when it is asked for it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order people meet them, then those that other packages add."""
        from noid.cli import plugin_commands

        added = (name for name in plugin_commands.names() if name not in COMMANDS)
        return [*COMMANDS, *super().list_commands(ctx), *added]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, importing its module. One that is no command of noid's may be another package's."""
        if cmd_name not in COMMANDS:
            from noid.cli import plugin_commands

            return super().get_command(ctx, cmd_name) or plugin_commands.find(cmd_name)
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        try:
            command = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise
            raise ConfigError(
                f"{cmd_name!r} is not part of this noid{FORM}. It is of one that is installed as a package."
            ) from error
        assert isinstance(command, click.Command)  # noqa: S101  # a static table of ours
        return command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings, by name alone, and the options, so that all of it fits a screen."""
        with formatter.section("Commands"):
            formatter.write_dl([(title, " ".join(names)) for title, names in SECTIONS.items()])
        with formatter.section("Options, of every command, before its name or after it"):
            formatter.write_text(
                "--json, -q (names only), --server URL, --local (this user's own agent), --timing (what took the "
                "server how long), -h; and noid -V for its version."
            )
        formatter.write_paragraph()
        formatter.write("More: noid help COMMAND, and noid help for a line about each.\n")

    def overview(self, ctx: click.Context) -> str:
        """Return a line about each command, under the headings."""
        formatter = ctx.make_formatter()
        sections = {title: list(names) for title, names in SECTIONS.items()}
        if added := self.list_commands(ctx)[len(COMMANDS) :]:
            sections["Of other packages"] = added
        for title, names in sections.items():
            with formatter.section(title):
                width = formatter.width - formatter.current_indent - max(map(len, COMMANDS)) - 2
                rows = [(name, self._short_help(ctx, name, width)) for name in names]
                formatter.write_dl([(f"{name:<{max(map(len, COMMANDS))}}", text) for name, text in rows])
        return formatter.getvalue().strip("\n")

    def _short_help(self, ctx: click.Context, name: str, width: int) -> str:
        try:
            command = self.get_command(ctx, name)
        except ConfigError:
            command = None
        return "(not to be had here)" if command is None else command.get_short_help_str(width)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands that begin with *incomplete*, without importing any of them."""
        from click.shell_completion import CompletionItem

        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name) for name in COMMANDS if name.startswith(incomplete)), *options]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Let ``noid help exec`` mean ``noid exec --help``, and ask what was meant where there is no such command."""
        if args == ["help"]:
            click.echo(self.overview(ctx))
            ctx.exit()
        if args[0] == "help":
            args = [*args[1:], "--help"]
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""
noid create web                 make a VM; without a server configured, here
noid exec web -- ls /           run a command in it
noid checkpoint web             freeze it: memory, processes, disk
noid restore web ID --as copy   wake a second one where the first was frozen
""",
)
@click.version_option(f"{__version__}{FORM}", "-V", "--version", prog_name="noid", message="%(prog)s %(version)s")
def cli() -> None:
    """Virtual machines that can be frozen, forked and woken in milliseconds."""


cli.params += common_options()


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    _open_standard_streams()
    code = run(args)
    _end(code)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line with *args*, the process' own if None, and return its exit code."""
    invocation = Call()
    # Not cli.main(), which has its own ideas about a closed pipe.
    try:
        with cli.make_context("noid", list(sys.argv[1:] if args is None else args), obj=invocation) as ctx:
            outcome = cli.invoke(ctx)
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return READER_GONE
    except Exception as error:  # the last resort, too: a bug must not look like anything else
        from noid.cli import complaints

        return complaints.tell(error, invocation)


def _open_standard_streams() -> None:
    """Make sure that 0, 1 and 2 are taken, or the first socket or file we open would become our stdin or stdout.

    And that whatever is printed can be: what the encoding of a stream has not is escaped.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123  # ends with the process
        elif stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _end(code: int) -> NoReturn:
    """End the process at once: taking an interpreter apart takes a tenth of the time of a short command.

    Whoever has something to bring in order did so before `run` returned.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            code = code or READER_GONE
        except OSError:
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
