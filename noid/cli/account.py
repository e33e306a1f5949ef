"""``noid whoami``, ``use``, ``current``: who to the server, which VM here."""

from __future__ import annotations

import click

from noid.cli.options import call, command
from noid.cli.output import printable, show
from noid.client.calls import account
from noid.client.settings import active_vm, set_active_vm
from noid.core.model.names import checked_name


@command(examples="noid whoami")
def whoami() -> None:
    """Show who you are to the server."""
    user = call().perform(account.whoami())
    text = f"User: {printable(user['name'])}\nID:   {printable(user['user_id'])}"
    token = user.get("token")
    if token is not None:
        text += f"\nToken: {printable(token)} ({printable(', '.join(user.get('scopes', ())))})"
    show(user, text, brief=user["name"])


@command(asks=False, examples="noid use web")
@click.argument("name")
def use(name: str) -> None:
    """Make a VM the one that commands in this directory mean. Writes .noid-vm; asks no server."""
    path = set_active_vm(checked_name(name))
    show({"active_vm": name, "file": str(path.absolute())}, f"Active VM set to '{name}'", brief=name)


@command(examples="noid current")
def current() -> None:
    """Show which server and which VM commands mean here. Asks no server."""
    address = call().endpoint.address
    marked = active_vm()
    shown = printable(marked[0]) if marked else "(none — run `noid use <name>`)"
    fields = {"server": address, "active_vm": marked[0] if marked else None}
    show(fields, f"Server: {address}\nActive VM: {shown}", brief=printable(marked[0]) if marked else "")
