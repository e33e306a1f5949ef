"""``noid-server``: which commands there are, and what they share. Each lives in a module of its own group."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from noid import __version__
from noid.errors import NoidError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

#: Which module has a command, so that each run imports only its own.
_ELSEWHERE = {
    "audit": "noid.server.audit_commands:audit",
    "add-user": "noid.server.user_commands:add_user",
    "check-config": "noid.server.setup_commands:check_config",
    "doctor": "noid.server.doctor_commands:doctor",
    "image": "noid.server.image_commands:image",
    "list-users": "noid.server.user_commands:list_users",
    "plugins": "noid.server.serve_commands:plugins",
    "quota": "noid.server.quota_commands:quota",
    "remove-user": "noid.server.user_commands:remove_user",
    "rotate-token": "noid.server.user_commands:rotate_token",
    "serve": "noid.server.serve_commands:serve",
    "setup": "noid.server.vmm_setup_command:setup",
    "systemd-unit": "noid.server.setup_commands:systemd_unit",
    "token": "noid.server.token_commands:token",
    "user": "noid.server.user_commands:user",
}
#: Commands of the predecessor that there are not, and what to do instead.
_GONE = {"update": "noid-server is part of noid, and updated with it: noid update"}
#: What the ``server`` extra installs, by the names it is imported under.
_SERVER_EXTRA = frozenset({"hypercorn", "quart", "quart_trio", "sqlite_utils", "werkzeug"})


def examples(*lines: str) -> str:
    """Return an epilog that shows *lines* as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


class Commands(click.Group):
    """Commands in the modules of `_ELSEWHERE`, and of plugins. Both are imported on demand."""

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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say of commands of the predecessor what to do instead."""
        if args[0] in _GONE:
            ctx.fail(f"No such command {args[0]!r}. {_GONE[args[0]]}")
        return super().resolve_command(ctx, args)

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


def config_options(command: F) -> F:
    """Add ``--config`` and ``--data-dir``, by which every command finds the same agent; also before its name."""

    def given(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
        return value if value is not None else ctx.find_root().params.get(param.name or "")

    command = click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        callback=given,
        help="Where VMs live; default as server.toml says.",
    )(command)
    return click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        callback=given,
        help="server.toml; else ./, ~/.noid/, /etc/noid/.",
    )(command)


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "noid-server image build                    make the image VMs boot by default",
        "noid-server add-user alice                 print a token for her",
        "noid-server                                serve until Ctrl+C, as serve does",
        "noid-server --config /etc/noid/server.toml",
    ),
)
@config_options
@click.version_option(__version__, message="noid-server %(version)s")
@click.pass_context
def cli(ctx: click.Context, config_path: Path | None, data_dir: Path | None) -> None:
    """Serve virtual machines that can be frozen, forked and woken in milliseconds."""
    if ctx.invoked_subcommand is None:
        serve = cli.get_command(ctx, "serve")
        assert serve is not None  # noqa: S101  # it is one of ours
        ctx.invoke(serve, config_path=config_path, data_dir=data_dir, local=False, ready_fd=None)


def config_and_plugins(config_path: Path | None, data_dir: Path | None) -> tuple[Any, Any]:
    """Return the configuration that these options mean, and the installed plugins.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    from noid.core.config.reading import load_admin_config
    from noid.core.plugins import Plugins

    return load_admin_config(config_path, data_dir=data_dir), Plugins()


def run(job: Callable[[], Awaitable[T]]) -> T:
    """Run *job* under trio and return its result."""
    import trio

    return trio.run(job)


def _sole_cause(error: BaseException) -> NoidError | None:
    """Return the `NoidError` that *error* is, or is a group of one of; None for everything else, which is a bug."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, NoidError) else None
