"""``noid auth``: the servers this user knows, and which of them commands talk to."""

from __future__ import annotations

import os
import sys

import click

from noid.cli.options import Group, command, confirmed, with_yes
from noid.cli.output import printable, say, show, table
from noid.client import servers
from noid.client.answers import Identity
from noid.client.settings import choose_endpoint
from noid.errors import InvalidRequest, NoidError
from noid.sync import Client

TOKEN_BYTES_MAX = 4096
STDIN = "-"


@click.group(cls=Group, epilog="noid auth setup --url https://noid.example.org\nnoid auth switch local")
def auth() -> None:
    """Say which server to use, and keep the tokens of several."""


@command(
    group=auth,
    asks=False,
    examples="""
noid auth setup --url https://noid.example.org
noid auth setup --url http://host:7654 --as work --token -
""",
)
@click.option("--url", metavar="URL", help="As https://noid.example.org or http://host:7654.")
@click.option("--token", metavar="TOKEN", help="Better not here, where others see it: - reads it from stdin.")
@click.option("--as", "name", metavar="NAME", help="What to call it; its host's name if not given.")
def setup(url: str | None, token: str | None, name: str | None) -> None:
    """Use a server from now on.

    The token is what `noid-server add-user` printed: asked for on a terminal, else read from stdin, or NOID_TOKEN. It
    is saved even if the server does not answer now.
    """
    if name is not None:
        servers.checked_server_name(name)
    url = servers.normalised_url(_asked("Server", "--url") if url is None else url)
    if token is not None and token != STDIN and _somebody_is_there():
        click.echo(
            "Note: other users see what is typed on the command line, and the shell keeps it. Without --token you are "
            "asked for it.",
            err=True,
        )
    server = servers.remember(url, servers.checked_token(_token(token)), name)
    path = servers.config_path()
    user: Identity | None = None
    try:
        user = Client(server.url, token=server.token).whoami()
    except NoidError as error:
        say(f"Warning: could not verify connection to {url}: {error}")
        click.echo("Run `noid current` to see what is saved and `noid whoami` to try again.", err=True)
    text = f"Configuration saved to {path}.\nServer: {url}"
    if user is not None:
        text += f"\nAuthenticated as '{printable(user['name'])}' (id: {printable(user['user_id'])})"
    show({"config": str(path), "server": url, "name": server.name, "user": user}, text, brief=server.name)
    _say_what_wins()


@command("list", group=auth, asks=False, examples="noid auth list")
def list_() -> None:
    """Show the servers you know. Asks none; tokens are not shown."""
    current = servers.in_use()
    entries = [(each.name, each.url, each.is_same(current)) for each in servers.known()]
    entries.append((servers.LOCAL, choose_endpoint(local=True).address, current is None))
    rows = [[name, url, "yes" if used else ""] for name, url, used in entries]
    value = [{"name": name, "url": url, "in_use": used} for name, url, used in entries]
    show(value, table(("name", "server", "in use"), rows), brief="\n".join(name for name, _, _ in entries))
    _say_what_wins()
    for path in servers.exposed():
        click.echo(f"Warning: other users can read {path}. Run: chmod 600 {path}", err=True)


@command(group=auth, asks=False, examples="noid auth switch work\nnoid auth switch local")
@click.argument("name")
def switch(name: str) -> None:
    """Use another of the servers you know from now on; local is this machine."""
    server = servers.switch(name)
    address = choose_endpoint(local=True).address if server is None else server.url
    show({"name": name, "server": address}, f"Server: {address}", brief=name)
    _say_what_wins()


@command(group=auth, asks=False, examples="noid auth logout work")
@click.argument("name", required=False)
@with_yes
def logout(name: str | None) -> None:
    """Forget a server and its token: the one in use if none is named.

    The token itself stays valid until it is revoked on the server.
    """
    current = servers.in_use()
    if name is None:
        name = next((each.name for each in servers.known() if each.is_same(current)), None)
        if name is None:
            raise InvalidRequest("no server is in use, so there is none to forget. See: noid auth list")
    doomed = servers.with_name(name)
    confirmed(f"Forget the server {name!r} ({doomed.url}) and its token?")
    was_in_use = servers.forget(name)
    text = f"Server '{name}' forgotten"
    if was_in_use:
        text += "\nCommands use this user's own agent now. Another server: noid auth switch NAME"
    show({"name": name, "server": doomed.url, "forgotten": True}, text, brief=name)


def _token(given: str | None) -> str:
    """Return the token: as given, from stdin, from ``NOID_TOKEN``, or as somebody types it."""
    if given is not None and given != STDIN:
        return given.strip()
    if given is None:
        if token := os.environ.get("NOID_TOKEN", "").strip():
            return token
        if _somebody_is_there():
            return str(click.prompt("Token", hide_input=True, err=True)).strip()
    said = b"" if sys.stdin is None else sys.stdin.buffer.read(TOKEN_BYTES_MAX + 1).strip()
    if len(said) > TOKEN_BYTES_MAX:
        raise InvalidRequest("what comes from stdin is much longer than a token. Nothing was changed.")
    if not said:
        raise click.UsageError("Missing the token. Pipe it into this command, or set NOID_TOKEN.")
    return said.decode("utf-8", "replace")


def _asked(what: str, option: str) -> str:
    if not _somebody_is_there():
        raise click.UsageError(f"Missing option {option!r}.")
    return str(click.prompt(what, err=True))


def _somebody_is_there() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _say_what_wins() -> None:
    for variable in ("NOID_SERVER", "NOID_URL"):
        if value := os.environ.get(variable):
            click.echo(f"Note: {variable} is set, and commands use that: {printable(value)}", err=True)
            return
