"""How one leaves a console: what ``--detach-keys``, the environment and ``config.toml`` say, and how it is told."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from noid.cli.options import call
from noid.cli.terminal import spelled
from noid.client.leaving import WaysOut, parsed
from noid.errors import ConfigError, InvalidRequest

DEFAULT = "ctrl-] ctrl-q ~. exit"
VARIABLE = "NOID_DETACH"
SETTING = "console.detach"


def chosen(option: str | None) -> WaysOut:
    """Return the ways out that *option* names, else ``$NOID_DETACH``, else the setting ``console.detach``, else ours.

    Raises:
        click.UsageError: *option* names something else.
        InvalidRequest, ConfigError: the environment or the setting does, or the file is broken.
    """
    if option is not None:
        try:
            return parsed(option)
        except InvalidRequest as error:
            raise click.UsageError(str(error)) from error
    said = os.environ.get(VARIABLE)
    if said is not None:
        return parsed(said)
    return parsed(_setting() or DEFAULT)


def told(ways: WaysOut) -> str:
    """Return the lines that say how one leaves, the predecessor's where that is one of them."""
    others = [spelled(keys) for keys in ways.keys]
    if ways.tilde:
        others.append("~. on a new line")
    lines = [f"Type '{word.decode()}' to detach." for word in ways.words]
    if others:
        lines.append(f"{'Or press' if lines else 'Press'} {_alternatives(others)}{'' if lines else ' to detach'}.")
    return "\n".join(lines)


def _alternatives(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _setting() -> str | None:
    from noid.client import preferences

    try:
        return preferences.get(SETTING)
    except ConfigError:
        if not call().local:
            raise
        return None  # --local works with a broken file, which says nothing then
