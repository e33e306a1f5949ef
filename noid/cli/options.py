"""What commands have in common: ``--json``, ``--local``, ``--server`` before or after the name, examples, which VM.

Every command imports this, ``--version`` included; what only some need is imported where they need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from noid.errors import NoidError

if TYPE_CHECKING:
    from noid.client.settings import Endpoint

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class Command(click.Command):
    """A command whose *epilog* are examples, shown as they are written. Also a mixin for groups."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        if self.epilog:
            formatter.write("\nExamples:\n")
            for line in self.epilog.strip().splitlines():
                formatter.write(f"  {line}\n")


class Group(Command, click.Group):
    """A group with examples."""


class Call:
    """One invocation of the command line: what was said beside the command itself."""

    def __init__(self) -> None:
        self.json = False
        self.local = False
        self.server: str | None = None

    @property
    def endpoint(self) -> Endpoint:
        """The agent to talk to. Read when it is needed: commands that need none work with a broken config file."""
        from noid.client.settings import choose_endpoint

        if self.local and self.server:
            raise click.UsageError("--local and --server exclude each other.")
        return choose_endpoint(local=self.local, server=self.server)


def call() -> Call:
    """Return the invocation that is running."""
    return click.get_current_context().ensure_object(Call)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        setattr(ctx.ensure_object(Call), param.name or "", value)


def with_endpoint(command: CommandT) -> CommandT:
    """Add ``--local`` and ``--server``."""
    server = click.option(
        "--server", metavar="URL", expose_value=False, callback=_remember, help="Talk to this server."
    )
    local = click.option(
        "--local", is_flag=True, expose_value=False, callback=_remember, help="Talk to this user's own agent."
    )
    return server(local(command))


def with_json(command: CommandT) -> CommandT:
    """Add ``--json``."""
    option = click.option("--json", is_flag=True, expose_value=False, callback=_remember, help="Print JSON.")
    return option(command)


def with_vm(command: CommandT) -> CommandT:
    """Add ``[NAME]`` and ``--name``, which mean the same. The command gets *name* and *name_option*."""
    return click.argument("name", required=False)(with_name_option(command))


def with_name_option(command: CommandT) -> CommandT:
    """Add ``--name`` alone, for commands with positionals of their own. The command gets *name_option*."""
    option = click.option("--name", "name_option", metavar="NAME", help="The VM, in place of the argument.")
    return option(command)


def chosen_name(name: str | None, name_option: str | None) -> str | None:
    """Return the VM the caller named, or None.

    Raises:
        click.UsageError: two different ones.
        InvalidRequest: it is no name.
    """
    from noid.core.model import checked_name

    if name is not None and name_option is not None and name != name_option:
        raise click.UsageError(f"two VMs are named: {name!r} and {name_option!r}.")
    chosen = name_option if name is None else name
    return None if chosen is None else checked_name(chosen)


def resolved_vm(name: str | None, name_option: str | None) -> str:
    """Return the VM that is meant: the one named, else the one this directory is bound to.

    Raises:
        NoidError: neither.
        InvalidRequest: it is no name.
    """
    from noid.client.settings import active_vm
    from noid.core.model import checked_name

    chosen = chosen_name(name, name_option)
    if chosen is not None:
        return chosen
    marked = active_vm()
    if marked is None:
        raise NoidError("no VM specified. Pass a name or run: noid use <name>")
    marked_name, path = marked
    return checked_name(marked_name, f"VM name in {path}")
