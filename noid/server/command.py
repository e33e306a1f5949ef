"""The ``noid-server`` commands. Each imports what it needs when it runs; plugins add theirs through a hook."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from noid import __version__
from noid.errors import ConfigError, NoidError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_ELSEWHERE = {"image": "noid.server.image_commands:image"}
#: What the ``server`` extra installs, by the names it is imported under.
_SERVER_EXTRA = frozenset({"hypercorn", "quart", "quart_trio", "sqlite_utils", "werkzeug"})


def examples(*lines: str) -> str:
    """Return an epilog that shows *lines* as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


class Commands(click.Group):
    """Commands defined here, in the modules of `_ELSEWHERE`, and by plugins; the latter two are imported on demand."""

    _asked_plugins = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return every command's name."""
        self._ask_plugins()
        return sorted({*self.commands, *_ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, asking plugins only for what nobody else has."""
        if cmd_name in _ELSEWHERE and cmd_name not in self.commands:
            module, _, attribute = _ELSEWHERE[cmd_name].partition(":")
            self.add_command(getattr(importlib.import_module(module), attribute), cmd_name)
        if cmd_name not in self.commands:
            self._ask_plugins()
        return self.commands.get(cmd_name)

    def _ask_plugins(self) -> None:
        if not self._asked_plugins:
            self._asked_plugins = True
            from noid.core.plugins import Plugins

            Plugins().hook.register_server_commands(cli=self)


def main() -> None:
    """Run ``noid-server``. What noid raises on purpose is one paragraph and exit status 1; anything else is a bug."""
    try:
        cli.main(prog_name="noid-server")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _SERVER_EXTRA:
            raise
        _fail(f"only the client is installed here ({error.name} is missing). Run: pip install 'noid[server]'")
    except (NoidError, BaseExceptionGroup) as error:
        cause = _sole_cause(error)
        if cause is None:
            raise
        _fail(str(cause))


def _fail(text: str) -> NoReturn:
    click.echo(f"Error: {text}", err=True)
    sys.exit(1)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "noid-server image build                    make the image VMs boot by default",
        "noid-server add-user alice                 print a token for her",
        "noid-server serve --config server.toml     serve until Ctrl+C",
    ),
)
@click.version_option(__version__, message="noid-server %(version)s")
def cli() -> None:
    """Serve virtual machines that can be frozen, forked and woken in milliseconds."""


def config_options(command: F) -> F:
    """Add ``--config`` and ``--data-dir``, by which every command finds the same agent."""
    command = click.option(
        "--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Where VMs live; default ~/.noid."
    )(command)
    return click.option(
        "--config", "config_path", type=click.Path(path_type=Path), help="server.toml; default in the data directory."
    )(command)


@cli.command(
    epilog=examples("noid-server serve --config /etc/noid/server.toml", "noid-server serve --local --data-dir /tmp/try")
)
@config_options
@click.option("--local", is_flag=True, help="Listen on the unix socket only.")
@click.option("--ready-fd", type=int, metavar="N", help='Write "ready" to this file descriptor once listening.')
def serve(config_path: Path | None, data_dir: Path | None, local: bool, ready_fd: int | None) -> None:
    """Run the agent and serve it.

    In the foreground, until SIGTERM or Ctrl+C. VMs keep running afterwards.
    """
    if ready_fd is not None:
        try:
            os.set_inheritable(ready_fd, False)  # or every VM would keep the pipe open
        except OSError as error:
            raise ConfigError(f"--ready-fd {ready_fd} is not an open file descriptor.") from error
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("noid.server.hypercorn").setLevel(logging.WARNING)  # its "Running on" is said better by ours

    from noid.core.config import load_config
    from noid.core.opening import open_agent
    from noid.core.plugins import Plugins
    from noid.server.serve import serve as serve_agent

    config = load_config(config_path, data_dir=data_dir, local=local)

    def ready() -> None:
        if ready_fd is not None:
            with contextlib.suppress(BrokenPipeError), os.fdopen(ready_fd, "w") as pipe:  # nobody waits any more
                pipe.write("ready\n")

    async def run() -> None:
        async with open_agent(config, Plugins()) as agent:
            await serve_agent(agent, config, ready=ready)

    _run(run)


@cli.command("add-user", epilog=examples("noid-server add-user alice > alice.token"))
@config_options
@click.argument("name")
def add_user(config_path: Path | None, data_dir: Path | None, name: str) -> None:
    """Add a user. The token, shown this once, is the only thing on stdout."""

    async def run() -> None:
        from noid.core.users import open_users

        async with open_users(*_config_and_plugins(config_path, data_dir)) as users:
            user, token = await users.add(name)
        click.echo(f"User '{user.name}' created (id: {user.id})", err=True)
        click.echo(token)

    _run(run)


@cli.command("rotate-token", epilog=examples("noid-server rotate-token alice > alice.token"))
@config_options
@click.argument("name")
def rotate_token(config_path: Path | None, data_dir: Path | None, name: str) -> None:
    """Make a user's token invalid, at once, and print a new one."""

    async def run() -> None:
        from noid.core.users import open_users

        async with open_users(*_config_and_plugins(config_path, data_dir)) as users:
            token = await users.rotate_token(name)
        click.echo(f"Token of user '{name}' replaced; the old one is invalid now.", err=True)
        click.echo(token)

    _run(run)


@cli.command("list-users", epilog=examples("noid-server list-users --data-dir /var/lib/noid"))
@config_options
def list_users(config_path: Path | None, data_dir: Path | None) -> None:
    """List users."""
    from noid.core.model import wire_time

    async def run() -> None:
        from noid.core.users import open_users

        async with open_users(*_config_and_plugins(config_path, data_dir)) as users:
            found = users.list()
        if not found:
            click.echo("No users.")
            return
        click.echo(f"{'ID':<36} {'NAME':<20} CREATED")
        for user in found:
            click.echo(f"{user.id:<36} {user.name:<20} {wire_time(user.created_at)}")

    _run(run)


@cli.command(epilog=examples("noid-server plugins"))
def plugins() -> None:
    """List installed plugins.

    What each implements, and why one cannot be loaded.
    """
    from noid.core.plugins import Plugins

    for plugin in Plugins().loaded:
        state = f"cannot be imported: {plugin.error}" if plugin.error else ", ".join(plugin.hooks)
        click.echo(f"{plugin.name:<20} {plugin.distribution} {plugin.version:<12} {state}")


def _config_and_plugins(config_path: Path | None, data_dir: Path | None) -> tuple[Any, Any]:
    from noid.core.config import load_config
    from noid.core.plugins import Plugins

    return load_config(config_path, data_dir=data_dir), Plugins()


def _run(job: Callable[[], Awaitable[T]]) -> T:
    import trio

    return trio.run(job)


def _sole_cause(error: BaseException) -> NoidError | None:
    """Return the `NoidError` that *error* is, or is a group of one of; None for everything else, which is a bug."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, NoidError) else None
