"""What the pages tell people to type exists, and the first lines of the README do what they say."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from noid.cli import main as noid_cli
from noid.server import command as server_command

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
PROGRAMS: dict[str, click.Command] = {"noid": noid_cli.cli, "noid-server": server_command.cli}
Pages = Callable[[str], Any]


def typed(page: Any) -> Iterator[list[str]]:
    """Yield what *page* tells people to type: every line with a prompt in a console block."""
    for block in page.blocks("console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                yield shlex.split(line[2:], comments=True)


def mentioned(page: Any) -> Iterator[list[str]]:
    """Yield the noid commands in *page*'s running text, which may leave out what a command needs."""
    text = re.sub(r"^```.*?^```|^\| `noid[^\n]*$", "", page.text, flags=re.MULTILINE | re.DOTALL)
    for words in re.findall(r"`(noid(?:-server)? [^`]+)`", text):
        if not re.search(r"\.\.\.|\[", words):
            yield shlex.split(words)


def examples(command: click.Command, path: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield the examples in the help of *command* and of what is below it."""
    epilog = re.sub(r"\\\n\s*", "", command.epilog or "")
    for line in epilog.splitlines():
        typed = re.split(r"\s{3,}|\s+\(", line.strip())[0]
        for command_line in re.split(r" (?:&&|\||;) ", typed):
            words = list(itertools.takewhile(lambda word: word not in (">", "<"), shlex.split(command_line)))
            if words and words[0] in PROGRAMS:
                yield words
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from examples(below, (*path, name))


def understood(words: list[str]) -> None:
    """Parse a command line as the program would, without running anything.

    Raises:
        click.UsageError: there is no such command or option, or something is missing.
    """
    command, arguments = PROGRAMS[words[0]], words[1:]
    context: click.Context | None = None
    while True:
        context = command.make_context(words[0], list(arguments), parent=context)
        if not isinstance(command, click.Group):
            return
        arguments = [*context._protected_args, *context.args]
        if not arguments:
            return  # a group alone shows its help
        _, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command = found


@pytest.mark.parametrize("name", PAGES)
def test_every_command_on_a_page_is_understood(page: Pages, name: str) -> None:
    for words in typed(page(name)):
        if words[0] in PROGRAMS:
            understood(words)
        else:
            assert (ROOT / words[0]).is_file(), words
    for words in mentioned(page(name)):
        with contextlib.suppress(click.MissingParameter):
            understood(words)


def test_the_readme_s_table_has_every_command_and_no_other(page: Pages) -> None:
    rows = page("README.md").section("Commands").rows("command", "what it does")
    named = {word for row in rows for word in re.findall(r"noid ([a-z-]+)", row[0])}
    assert named == set(noid_cli.COMMANDS)


def test_every_example_of_the_help_is_understood() -> None:
    found = [words for name, command in PROGRAMS.items() for words in examples(command, (name,))]
    assert len(found) > 25
    for words in found:
        understood(words)


def test_a_command_that_does_not_exist_is_noticed() -> None:
    for line in ("noid forge web", "noid create web --gpus 1", "noid-server image import x --kernel k"):
        with pytest.raises(click.UsageError):
            understood(line.split())


@pytest.mark.vm
def test_the_first_lines_of_the_readme_are_true(page: Pages, data_dir: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NOID_")}
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    environment |= {"NOID_DATA_DIR": str(data_dir), "HOME": str(tmp_path), "XDG_CACHE_HOME": cache}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
        return subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    built = run("noid-server", "image", "build", "--tiny")
    if built.returncode != 0 and "Error:" in built.stderr:
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr
    printed = {}
    checkpoint = "?"
    for line in page("README.md").blocks("console")[0].splitlines():
        words = [checkpoint if word == "ID" else word for word in shlex.split(line[2:], comments=True)]
        done = run(*words)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        printed[words[1]] = done.stdout
        if words[1] == "checkpoint":
            found = re.search(r"'([0-9a-f]{16})'", done.stdout)
            assert found is not None, done.stdout
            checkpoint = found[1]
    assert printed["exec"].startswith("Linux web "), "the guest is not called what its VM is called"
    assert run("noid", "exec", "copy", "--", "hostname").stdout == "copy\n"
    for name in ("web", "copy"):
        assert run("noid", "destroy", name).returncode == 0
