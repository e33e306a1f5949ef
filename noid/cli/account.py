"""``noid auth setup``, ``whoami``, ``use``, ``current``: which server, who to it, which VM here."""

from __future__ import annotations

import click

from noid.cli.options import Group, call, command
from noid.cli.output import printable, show
from noid.client.answers import Identity
from noid.client.blocking import Client
from noid.client.calls import account
from noid.client.settings import Endpoint, active_vm, checked_token, normalised_url, save_server, set_active_vm
from noid.core.model import checked_name
from noid.errors import NoidError


@click.group(cls=Group, epilog="noid auth setup --url http://host:7654 --token noid_tok_...")
def auth() -> None:
    """Say which server to use."""


@command(group=auth, asks=False, examples="noid auth setup --url http://host:7654 --token noid_tok_...")
@click.option("--url", required=True, metavar="URL", help="For example https://noid.example.org or http://host:7654.")
@click.option("--token", required=True, metavar="TOKEN", help="What `noid-server add-user` printed.")
def setup(url: str, token: str) -> None:
    """Use a server from now on. It is saved even if it does not answer now."""
    url, token = normalised_url(url), checked_token(token.strip())
    path = save_server(url, token)
    user: Identity | None = None
    try:
        user = Client(Endpoint(url=url, token=token)).perform(account.whoami())
    except NoidError as error:
        click.echo(f"Warning: could not verify connection to {url}: {error}", err=True)
        click.echo("Run `noid current` to see what is saved and `noid whoami` to try again.", err=True)
    text = f"Configuration saved to {path}.\nServer: {url}"
    if user is not None:
        text += f"\nAuthenticated as '{printable(user['name'])}' (id: {printable(user['user_id'])})"
    show({"config": str(path), "server": url, "user": user}, text)


@command(examples="noid whoami")
def whoami() -> None:
    """Show who you are to the server."""
    user = call().perform(account.whoami())
    text = f"User: {printable(user['name'])}\nID:   {printable(user['user_id'])}"
    token = user.get("token")
    if token is not None:
        text += f"\nToken: {printable(token)} ({printable(', '.join(user.get('scopes', ())))})"
    show(user, text)


@command(asks=False, examples="noid use web")
@click.argument("name")
def use(name: str) -> None:
    """Make a VM the one that commands in this directory mean. Writes .noid-vm; asks no server."""
    path = set_active_vm(checked_name(name))
    show({"active_vm": name, "file": str(path.absolute())}, f"Active VM set to '{name}'")


@command(examples="noid current")
def current() -> None:
    """Show which server and which VM commands mean here. Asks no server."""
    address = call().endpoint.address
    marked = active_vm()
    shown = printable(marked[0]) if marked else "(none — run `noid use <name>`)"
    fields = {"server": address, "active_vm": marked[0] if marked else None}
    show(fields, f"Server: {address}\nActive VM: {shown}")
