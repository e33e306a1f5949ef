"""``noid-server add-user``, ``rotate-token``, ``list-users``, ``remove-user``: who may come in."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import click

from noid.server.command import cli, config_and_plugins, config_options, examples, run


@click.command("add-user", epilog=examples("noid-server add-user alice > alice.token"))
@config_options
@click.argument("name")
def add_user(config_path: Path | None, data_dir: Path | None, name: str) -> None:
    """Add a user. The token, shown this once, is the only thing on stdout."""

    async def job() -> None:
        from noid.core.people.users import open_users

        async with open_users(*config_and_plugins(config_path, data_dir)) as users:
            user, token = await users.add(name)
            await users.note("add-user", name)
        click.echo(f"User '{user.name}' created (id: {user.id})", err=True)
        click.echo(token)

    run(job)


@click.command("rotate-token", epilog=examples("noid-server rotate-token alice > alice.token"))
@config_options
@click.argument("name")
def rotate_token(config_path: Path | None, data_dir: Path | None, name: str) -> None:
    """Revoke all tokens of a user, and print a new one."""

    async def job() -> None:
        from noid.core.people.users import open_users

        async with open_users(*config_and_plugins(config_path, data_dir)) as users:
            token = await users.rotate_token(name)
            await users.note("rotate-token", name)
        click.echo(f"Token of user '{name}' replaced; the old one is invalid now.", err=True)
        click.echo(token)

    run(job)


@click.command("list-users", epilog=examples("noid-server list-users --data-dir /var/lib/noid"))
@config_options
def list_users(config_path: Path | None, data_dir: Path | None) -> None:
    """List users."""
    from noid.core.model.times import wire_time

    async def job() -> None:
        from noid.core.people.users import open_users

        async with open_users(*config_and_plugins(config_path, data_dir)) as users:
            found = users.list()
        if not found:
            click.echo("No users.")
            return
        click.echo(f"{'ID':<36} {'NAME':<20} CREATED")
        for user in found:
            click.echo(f"{user.id:<36} {user.name:<20} {wire_time(user.created_at)}")

    run(job)


@click.command("remove-user", epilog=examples("noid-server remove-user alice"))
@config_options
@click.argument("name")
def remove_user(config_path: Path | None, data_dir: Path | None, name: str) -> None:
    """Remove a user with all they have.

    That is tokens, checkpoints, files, and VMs, running or not. A running server does it; without one, this command
    does. Cut off, it can be repeated.
    """
    from noid.core.model.names import checked_name
    from noid.core.opening import open_agent
    from noid.core.people import departures
    from noid.server import running

    checked_name(name, "user name")
    config, plugins = config_and_plugins(config_path, data_dir)
    removed = running.ask(config, "DELETE", f"/v1/users/{name}")

    async def job() -> dict[str, int]:
        async with open_agent(config, plugins) as agent:
            removed = await departures.remove_user(agent, name)
            await agent.users.note("remove-user", name)
            return dataclasses.asdict(removed)

    if removed is None:
        removed = run(job)
    vms, checkpoints = _counted(removed["vms"], "VM"), _counted(removed["checkpoints"], "checkpoint")
    mib = removed["bytes"] / (1 << 20)
    click.echo(f"User '{name}' removed, with {vms} and {checkpoints}: {mib:.1f} MiB.", err=True)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


class Spellings(click.Group):
    """Commands of `cli` under other names."""

    def __init__(self, name: str, meant: dict[str, str], **attributes: Any) -> None:
        super().__init__(name, context_settings={"help_option_names": ["-h", "--help"]}, **attributes)
        self._meant = meant

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return every name."""
        return [name for name, meant in self._meant.items() if cli.get_command(ctx, meant) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command that is meant, with this name in its examples."""
        meant = self._meant.get(cmd_name)
        command = None if meant is None else cli.get_command(ctx, meant)
        if command is None:
            return None
        command = copy.copy(command)
        command.name = cmd_name
        command.epilog = (command.epilog or "").replace(f"noid-server {meant}", f"noid-server {self.name} {cmd_name}")
        return command


user = Spellings(
    "user",
    {"create": "add-user", "rotate-token": "rotate-token", "delete": "remove-user", "list": "list-users"},
    help="Look after users: the same commands under other names.",
    epilog=examples("noid-server user create alice > alice.token"),
)
