"""Writes docs/reference.md: every command of ``noid`` with its options and examples, from its own help.

Usage: scripts/reference. A test says when it is to be run: after a change of any command's help.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from noid.cli.main import SECTIONS, cli
from noid.cli.options import CommonOption

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
WIDTH = 200  # nothing is wrapped: Markdown does that

BEGINNING = """# Every command

Made by `scripts/reference` from what `--help` says of each. [commands.md](commands.md) has what goes beyond that.
"""


def reference() -> str:
    """Return the page."""
    context = click.Context(cli, info_name="noid", terminal_width=WIDTH)
    parts = [
        BEGINNING,
        "## Options of every command\n\nBefore its name or after it.\n",
        _options(context, CommonOption),
    ]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            command = cli.get_command(context, name)
            assert command is not None  # noqa: S101  # a static table of ours
            for path, found in _with_those_below(("noid", name), command):
                parts.append(_described(path, found))
    return "\n".join(parts)


def _with_those_below(path: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None  # noqa: S101  # the group has just named it
            yield from _with_those_below((*path, name), below)


def _described(path: tuple[str, ...], command: click.Command) -> str:
    """Return the section of *command*, whose whole name is *path*."""
    context = click.Context(command, info_name=" ".join(path), terminal_width=WIDTH)
    usage = context.get_usage().removeprefix("Usage: ")
    text = inspect.cleandoc(command.help or "")
    lines = [line.strip() for line in inspect.cleandoc(command.epilog or "").splitlines()]
    blocks = [f"### {' '.join(path)}\n", f"```\n{usage}\n```\n", f"{text}\n", _options(context, click.Option)]
    if lines:
        blocks.append("\n".join(["For example:\n", "```", *lines, "```\n"]))
    return "\n".join(block for block in blocks if block)


def _options(context: click.Context, kind: type[click.Option]) -> str:
    """Return a table of the options of *kind* that the command has and others have not, or nothing."""
    rows = []
    for parameter in context.command.get_params(context):
        is_common = isinstance(parameter, CommonOption)
        if not isinstance(parameter, kind) or "--help" in parameter.opts or (is_common and kind is click.Option):
            continue
        shown = copy.copy(parameter)
        shown.hidden = shown.hidden and not is_common  # in help they are told in one line
        record = shown.get_help_record(context)
        if record is not None:
            rows.append("| " + " | ".join((f"`{_cell(record[0])}`", _cell(record[1]))) + " |")
    return "\n".join(["| option | what it does |", "|---|---|", *rows, ""]) if rows else ""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
