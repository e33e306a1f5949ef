"""docs/compatibility.md is true: what it calls accepted is, and what it calls refused is refused with that hint."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import pytest

from noid.cli import main as noid_cli
from noid.core.config_reading import load_config
from noid.errors import ConfigError
from noid.server import command as server_command
from noid.server.serve import all_routes

Pages = Callable[[str], Any]
PAGE = "docs/compatibility.md"
PROGRAMS: dict[str, click.Command] = {"noid": noid_cli.cli, "noid-server": server_command.cli}


def parsed(line: str) -> None:
    """Parse a command line as the program would, without running anything."""
    name, *arguments = shlex.split(line)
    command: click.Command = PROGRAMS[name]
    context = command.make_context(name, arguments)
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, found.make_context(found.name, rest, parent=context)


def test_every_path_leads_where_the_page_says(page: Pages) -> None:
    paths = {path: route.path for route in all_routes(Mock(), Mock(), Mock()) for path in route.paths}
    for path, meant in page(PAGE).rows("path", "is"):
        assert paths[path] == meant


def test_every_command_is_accepted(page: Pages) -> None:
    for line, _ in page(PAGE).rows("command", "since, or in"):
        parsed(line)


def test_what_is_refused_is_refused_with_its_hint(page: Pages, tmp_path: Path) -> None:
    for text, hint in page(PAGE).rows("typed or written", "hint"):
        if text.partition(" ")[0] in PROGRAMS:
            with pytest.raises(click.UsageError, match=hint):
                parsed(text)
        else:
            (tmp_path / "server.toml").write_text(text)
            with pytest.raises(ConfigError) as refused:
                load_config(tmp_path / "server.toml")
            assert hint in str(refused.value)
