"""``noid-server token``: a user's tokens, several, named, each with what it allows and when it ends."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta
from pathlib import Path

import click

from noid.server.command import config_and_plugins, config_options, examples, run

_SPAN = re.compile(r"(\d{1,6})([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SCOPES = ("read", "exec", "manage")


class Span(click.ParamType[timedelta]):
    """How long: ``90s``, ``15m``, ``12h``, ``30d``, ``8w``."""

    name = "span"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return *value* as a span of time."""
        if isinstance(value, timedelta):
            return value
        match = _SPAN.fullmatch(str(value).strip())
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is no span of time. Write it as 90s, 15m, 12h, 30d or 8w.", param, ctx)
        return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


@click.group(epilog=examples("noid-server token create alice --name ci", "noid-server token list alice"))
def token() -> None:
    """Make, list and revoke the tokens of a user."""


@token.command(
    epilog=examples(
        "noid-server token create alice --name ci > ci.token",
        "noid-server token create alice --name ro --scope read --expires-in 30d",
    )
)
@config_options
@click.argument("user")
@click.option("--name", default="default", show_default=True, help="What to call it.")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(_SCOPES), help="What it allows; again for more. Default: all."
)
@click.option("--expires-in", type=Span(), metavar="SPAN", help="When it ends; default: never.")
def create(
    config_path: Path | None,
    data_dir: Path | None,
    user: str,
    name: str,
    scopes: tuple[str, ...],
    expires_in: timedelta | None,
) -> None:
    """Make one more token of a user.

    It is shown this once and is all there is on stdout. Other tokens stay valid.
    """
    from noid.core.model.times import now
    from noid.core.model.users import Scope
    from noid.core.people.users import open_users, ordered

    async def job() -> None:
        expires_at = None if expires_in is None else now() + expires_in
        allowed = frozenset(map(Scope, scopes or _SCOPES))
        async with open_users(*config_and_plugins(config_path, data_dir)) as users:
            made, info = await users.create_token(users.named(user), name, allowed, expires_at)
            await users.note("token create", f"{user}/{name}")
        end = f"until {_shown(info.expires_at)} UTC" if info.expires_at else "until it is revoked"
        click.echo(f"Token '{name}' of user '{user}' allows {', '.join(ordered(info.scopes))}, {end}.", err=True)
        click.echo(made)

    run(job)


@token.command("list", epilog=examples("noid-server token list alice"))
@config_options
@click.argument("user")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_tokens(config_path: Path | None, data_dir: Path | None, user: str, as_json: bool) -> None:
    """List a user's tokens, without what they are."""
    from noid.core.model.times import now
    from noid.core.people.users import open_users, ordered, token_fields

    async def job() -> None:
        async with open_users(*config_and_plugins(config_path, data_dir)) as users:
            infos = await users.tokens(users.named(user))
        if as_json:
            click.echo(json.dumps([token_fields(info) for info in infos], indent=2))
            return
        click.echo(f"{'NAME':<24} {'SCOPES':<18} {'CREATED':<19} {'EXPIRES':<19} LAST USED")
        for info in infos:
            expires = _shown(info.expires_at)
            if info.expires_at is not None and info.expires_at <= now():
                expires = "expired"
            click.echo(
                f"{info.name:<24} {','.join(ordered(info.scopes)):<18} {_shown(info.created_at):<19} {expires:<19} "
                f"{_shown(info.last_used_at)}"
            )

    run(job)


@token.command(epilog=examples("noid-server token revoke alice ci"))
@config_options
@click.argument("user")
@click.argument("name")
def revoke(config_path: Path | None, data_dir: Path | None, user: str, name: str) -> None:
    """Make one token of a user invalid, from the next request on."""
    from noid.core.people.users import open_users

    async def job() -> None:
        async with open_users(*config_and_plugins(config_path, data_dir)) as users:
            await users.revoke_token(users.named(user), name)
            await users.note("token revoke", f"{user}/{name}")
        click.echo(f"Token '{name}' of user '{user}' is invalid now.", err=True)

    run(job)


def _shown(moment: datetime | None) -> str:
    from noid.core.model.times import wire_time

    return "-" if moment is None else wire_time(moment)
