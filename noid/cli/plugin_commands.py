"""Commands that other packages add to ``noid``: entry points of the group ``noid.commands``, each a `click.Command`.

Looking them up costs as much as everything else that starting takes, so it is done for words that are no command of
ours and for ``noid help``. A package cannot take the place of a command that noid has.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import click

from noid.errors import ConfigError

GROUP = "noid.commands"


def names() -> list[str]:
    """Return the names of all of them, sorted; without importing any."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def find(name: str) -> click.Command | None:
    """Return the command *name*, or None if no package has it.

    Raises:
        ConfigError: it cannot be imported, is no command, or two packages have it.
    """
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        return None
    sources = sorted({_source(entry) for entry in found})
    if len(sources) > 1:
        raise ConfigError(f"the command {name!r} is of several packages: {', '.join(sources)}. Uninstall all but one.")
    try:
        command = found[0].load()
    except Exception as error:  # whatever somebody else's module does when it is imported
        raise ConfigError(
            f"the command {name!r} of {sources[0]} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(command, click.Command):
        raise ConfigError(f"the command {name!r} of {sources[0]} is no click.Command: {found[0].value}")
    return command


def _source(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
