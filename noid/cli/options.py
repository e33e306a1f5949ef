"""What commands have in common: `command` gives each its examples and the options of all; and which VM is meant.

Every command imports this, ``--version`` included; what only some need is imported where they need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from noid.errors import NoidError

if TYPE_CHECKING:
    from noid.client.calls.call import AnswerT
    from noid.client.calls.call import Call as Request
    from noid.client.link import Link
    from noid.client.settings import Endpoint
    from noid.sync import Client

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class CommonOption(click.Option):
    """An option that every command has, before its name or after it. Told in one line, not in a list each time."""

    def __init__(self, words: list[str], *, help_text: str, metavar: str | None = None) -> None:
        super().__init__(
            words,
            is_flag=metavar is None,
            metavar=metavar,
            help=help_text,
            hidden=True,
            expose_value=False,
            callback=_remember,
        )


class NameOption(click.Option):
    """``--name``, which means the same as the argument. Told in one line, too."""


class Command(click.Command):
    """A command whose *epilog* are examples, shown as they are written. Also a mixin for groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of this command, and in a line those that many have: help is to fit a screen."""
        own: list[tuple[str, str]] = []
        shared = ["-h"]
        for parameter in self.get_params(ctx):
            if isinstance(parameter, CommonOption):
                shared.append(parameter.opts[0])
            elif isinstance(parameter, NameOption):
                shared.insert(0, "--name")
            elif isinstance(parameter, click.Option) and "--help" not in parameter.opts:
                record = parameter.get_help_record(ctx)
                own += [record] if record is not None else []
        with formatter.section("Options"):
            if own:
                formatter.write_dl(own, col_max=26)
            formatter.write_text(f"Also {', '.join(shared)}: see noid --help.")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        if self.epilog:
            formatter.write("\nExamples:\n")
            for line in self.epilog.strip().splitlines():
                formatter.write(f"  {line}\n")


class Group(Command, click.Group):
    """A group with examples, which asks what was meant where there is no such command."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that *args* begin with, its name, and what follows."""
        word = args[0]
        if not word.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, word) is None:
            from noid.cli.suggestions import of_command

            raise click.UsageError(
                f"No such command {word!r}. {of_command(word, self.list_commands(ctx))}".rstrip(), ctx
            )
        return super().resolve_command(ctx, args)


class Call:
    """One invocation of the command line: what was said beside the command itself."""

    def __init__(self) -> None:
        self.json = False
        self.quiet = False
        self.timing = False
        self.yes = False
        self.local = False
        self.server: str | None = None
        self.fails_with = 1
        """The exit code when it fails: commands that end with a guest's exit code have one apart from those."""
        self._warned = False

    @property
    def endpoint(self) -> Endpoint:
        """The agent to talk to. Read when it is needed: commands that need none work with a broken config file."""
        from noid.client.settings import choose_endpoint

        if self.local and self.server:
            raise click.UsageError("--local and --server exclude each other.")
        chosen = choose_endpoint(local=self.local, server=self.server)
        if chosen.token is not None and not self._warned:
            self._warned = True
            _warn_of_exposed_tokens()
        return chosen

    @property
    def client(self) -> Client:
        """The SDK's client of that agent."""
        from noid.sync import Client

        return Client(link=self._link)

    @property
    def _link(self) -> Link:
        from noid.client.link import Link
        from noid.client.waiting import Blocking

        return Link(self.endpoint, Blocking())

    def perform(self, request: Request[AnswerT], doing: str | None = None) -> AnswerT:
        """Make *request* of that agent. *doing* is shown on a terminal when it takes longer than one likes to wait.

        From another thread than the command's, nothing is shown: that is the command's own affair.
        """
        from noid.client.waiting import finished

        if click.get_current_context(silent=True) is None:
            return finished(self._link.perform(request))
        import time

        from noid.cli.output import progress, show_timing

        link, began = self._link, time.perf_counter()
        try:
            with progress(doing or f"Waiting for {link.endpoint.address}"):
                answer = finished(link.perform(request))
        except KeyboardInterrupt:
            if doing is not None and not self.quiet:
                click.echo("Interrupted. What the server has begun it finishes.", err=True)
            raise
        if self.timing:
            phases = answer.get("timings") if isinstance(answer, dict) else None
            asked = f"{request.method} {request.path.partition('?')[0]}"
            show_timing(phases or {}, time.perf_counter() - began, asked)
        return answer


def _warn_of_exposed_tokens() -> None:
    """Tell the person at the terminal of files that give tokens away. What scripts see stays as it is."""
    import sys

    from noid.client.servers import exposed

    if sys.stderr is not None and sys.stderr.isatty():
        for path in exposed():
            click.echo(f"Warning: other users can read {path}, and so your token. Run: chmod 600 {path}", err=True)


def call() -> Call:
    """Return the invocation that is running."""
    return click.get_current_context().ensure_object(Call)


def command(
    name: str | None = None,
    *,
    examples: str,
    asks: bool = True,
    cls: type[click.Command] = Command,
    group: click.Group | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Return what makes a function a command with *examples* and the common options; those of an agent if it *asks*.

    A command's *name* is the function's without a trailing underscore unless it is given.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        wanted = name or function.__name__.rstrip("_").replace("_", "-")
        made = click.command(wanted, cls=cls, epilog=examples)(function)
        made.params += common_options(asks=asks)
        if group is not None:
            group.add_command(made)
        return made

    return decorate


def common_options(*, asks: bool = True) -> list[click.Parameter]:
    """Return the options that every command has; with those of an agent if it *asks* one."""
    options: list[click.Parameter] = [
        CommonOption(["--json"], help_text="Print JSON."),
        CommonOption(["-q", "--quiet", "quiet"], help_text="Print names and ids only, and no progress."),
    ]
    if asks:
        options += [
            CommonOption(["--server"], metavar="SERVER", help_text="Talk to this server: its URL, or its name."),
            CommonOption(["--local"], help_text="Talk to this user's own agent."),
            CommonOption(["--timing"], help_text="Show how long each phase took on the server."),
        ]
    return options


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        setattr(ctx.ensure_object(Call), param.name or "", value)


def with_yes(command: CommandT) -> CommandT:
    """Add ``-y`` and ``--yes``, for commands that ask with `confirmed` before they destroy something."""
    option = click.option("-y", "--yes", is_flag=True, expose_value=False, callback=_remember, help="Do not ask.")
    return option(command)


class Refused(click.ClickException):
    """Somebody was asked and did not say yes."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Say so. It is no error: they know what they answered."""
        click.echo(self.message, file=file, err=True)


def confirmed(question: str) -> None:
    """Go on if the person at the terminal says yes to *question*; there is nobody to ask where there is no terminal.

    Nobody is asked with ``--yes``, ``--json`` or ``--quiet``, nor unless both stdin and stderr are terminals, so that
    scripts run as they always did.

    Raises:
        Refused: exit code 1. Whatever the answer was, it was not yes.
    """
    import sys

    invocation = call()
    if invocation.yes or invocation.json or invocation.quiet:
        return
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        return
    click.echo(f"{question} [y/N] ", nl=False, err=True)
    answer = sys.stdin.buffer.readline()  # as bytes: an answer that is no text is no yes
    if not answer.endswith(b"\n"):
        click.echo(err=True)
    if answer.strip().lower() not in (b"y", b"yes"):
        raise Refused("Nothing was changed.")


def with_vm(command: CommandT) -> CommandT:
    """Add ``[NAME]`` and ``--name``, which mean the same. The command gets *name* and *name_option*."""
    return click.argument("name", required=False)(with_name_option(command))


def with_name_option(command: CommandT) -> CommandT:
    """Add ``--name`` alone, for commands with positionals of their own. The command gets *name_option*."""
    help_text = "The VM, in place of the argument."
    option = click.option("--name", "name_option", cls=NameOption, metavar="NAME", help=help_text)
    return option(command)


def with_vms(command: CommandT) -> CommandT:
    """Add ``[NAME]...`` and ``--name``. The command gets *names* and *name_option*."""
    return click.argument("names", nargs=-1, metavar="[NAME]...")(with_name_option(command))


def with_labels(help_text: str, metavar: str = "KEY=VALUE") -> Callable[[CommandT], CommandT]:
    """Return the option ``--label``, which may be repeated. The command gets *labels*, the texts."""
    return click.option("--label", "labels", multiple=True, metavar=metavar, help=help_text)


def chosen_name(name: str | None, name_option: str | None) -> str | None:
    """Return the VM the caller named, or None.

    Raises:
        click.UsageError: two different ones.
        InvalidRequest: it is no name.
    """
    from noid.core.model.names import checked_name

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
    from noid.core.model.names import checked_name

    chosen = chosen_name(name, name_option)
    if chosen is not None:
        return chosen
    marked = active_vm()
    if marked is None:
        raise NoidError("no VM specified. Pass a name or run: noid use <name>")
    marked_name, path = marked
    return checked_name(marked_name, f"VM name in {path}")


def resolved_vms(names: tuple[str, ...], name_option: str | None) -> list[str]:
    """Return the VMs that are meant, each once: those named, else the one this directory is bound to.

    Raises:
        click.UsageError: both ways of naming several are used.
        NoidError: none is meant.
        InvalidRequest: one is no name.
    """
    if len(names) < 2:
        return [resolved_vm(names[0] if names else None, name_option)]
    if name_option is not None:
        raise click.UsageError("VMs are named both by --name and as arguments.")
    return [resolved_vm(name, None) for name in dict.fromkeys(names)]


def for_each(names: list[str], act: Callable[[str], None]) -> None:
    """Do *act* for each of *names*. One that fails keeps none of the others from it.

    Raises:
        NoidError: the only one failed.
        click.exceptions.Exit: one of several failed, and that was said when it did.
    """
    if len(names) == 1:
        act(names[0])
        return
    failed = False
    for name in names:
        try:
            act(name)
        except NoidError as error:
            from noid.cli import complaints

            complaints.tell(error, call())
            failed = True
    if failed:
        click.get_current_context().exit(1)
