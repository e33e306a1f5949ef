"""``noid-server quota``: what a user may have. It counts for a running server from the next reservation on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from noid.server.command import config_and_plugins, config_options, examples, run

NONE, DEFAULT = "none", "default"
_LIMITS = {
    "vms": "VMs.",
    "vcpus": "vCPUs of all VMs.",
    "mem_mib": "MiB of memory of all VMs.",
    "checkpoints": "Checkpoints.",
    "bytes": "Bytes on disk of VMs and checkpoints.",
    "exec_sessions": "Processes that run at once.",
}


class Limit(click.ParamType[str]):
    """A whole number, ``none`` for no limit, or ``default`` for what server.toml says."""

    name = "limit"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return *value* if it is one."""
        text = str(value).strip()
        if text not in (NONE, DEFAULT) and not (text.isascii() and text.isdigit() and len(text) <= 18):
            self.fail(f"{text!r} is no limit. Write a whole number, {NONE} or {DEFAULT}.", param, ctx)
        return text


def _limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, about in reversed(_LIMITS.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, type=Limit(), metavar="N", help=about)(command)
    return command


@click.command(epilog=examples("noid-server quota alice", "noid-server quota alice --vms 10 --mem-mib none"))
@config_options
@click.argument("user")
@_limit_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def quota(config_path: Path | None, data_dir: Path | None, user: str, as_json: bool, **given: str | None) -> None:
    """Show or change what a user may have.

    What they have is shown beside it. N is a whole number, none for no limit, or default for what [quota] says.
    """
    from noid.core.layout import Layout
    from noid.core.people.quotas import Quotas
    from noid.core.people.users import open_users

    async def job() -> None:
        changed = {name: text for name, text in given.items() if text is not None}
        config, plugins = config_and_plugins(config_path, data_dir)
        async with open_users(config, plugins) as users:
            quotas = Quotas(users.store, Layout(config.data_dir), config.quota, config.limits)
            owner = users.named(user)
            if changed:
                reset = frozenset(name for name, text in changed.items() if text == DEFAULT)
                limits = {
                    name: None if text == NONE else int(text) for name, text in changed.items() if text != DEFAULT
                }
                await quotas.set_limits(owner, limits, reset)
                said = " ".join(f"{name}={text}" for name, text in changed.items())
                await users.note("quota", f"{user} {said}")
            limits, use = quotas.limits(owner), await quotas.use(owner)
        if as_json:
            click.echo(json.dumps({"limits": limits, "use": use}, indent=2))
            return
        click.echo(f"{'RESOURCE':<14} {'LIMIT':>16} {'USE':>16}")
        for name, most in limits.items():
            click.echo(f"{name:<14} {NONE if most is None else most:>16} {use.get(name, '-'):>16}")

    run(job)
