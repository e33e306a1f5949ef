"""``noid bench``: measures noid on this machine and says whether it keeps its promises.

What measures is imported when it runs: ``noid --help`` works without what only a server needs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from noid import __version__
from noid.cli.options import Command, Group
from noid.core import paths
from noid.errors import ConfigError
from noid_bench.report import Figure, host_facts, table

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def _with_choices(command: CommandT) -> CommandT:
    for option in (
        click.option("--dir", "directory", type=click.Path(path_type=Path), help="Where to work. [the data directory]"),
        click.option("--rounds", default=7, show_default=True, type=click.IntRange(1, 1000), help="Samples a figure."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table."),
    ):
        command = option(command)
    return command


@click.group(
    cls=Group,
    invoke_without_command=True,
    epilog="noid bench\nnoid bench --json --rounds 20 > before.json\nnoid bench server\nnoid bench cli",
)
@_with_choices
@click.option("--image", metavar="IMAGE", help="The image to measure. [default, else a tiny one]")
@click.pass_context
def bench(ctx: click.Context, as_json: bool, image: str | None, rounds: int, directory: Path | None) -> int:
    """Measure noid beside the raw floor of this machine.

    Every figure with a floor is a ratio to what a bare script takes for the same, measured in the same run. The exit
    status is 1 when a "must" is missed.
    """
    if ctx.invoked_subcommand is not None:  # what is said before its name is said to it
        ctx.default_map = {ctx.invoked_subcommand: ctx.params}
        return 0
    import trio

    with _needs_a_server():
        from noid_bench.rig import MEM_MIB
        from noid_bench.run import measure
    figures = trio.run(measure, image, rounds, directory or paths.data_dir())
    return _show(figures, as_json, guest_mem_mib=MEM_MIB)


@bench.command(
    name="server", cls=Command, epilog="noid bench server\nnoid bench server --json --rounds 20 > before.json"
)
@_with_choices
def bench_server(as_json: bool, rounds: int, directory: Path | None) -> int:
    """Measure what a request costs beside bare servers with the same answers.

    The server's machines are simulated, everything else is real. No image is needed.
    """
    with _needs_a_server():
        from noid_bench.http_server import measure_server
    return _show(measure_server(rounds, directory or paths.data_dir()), as_json)


@bench.command(name="cli", cls=Command, epilog="noid bench cli\nnoid bench cli --json --rounds 20 > before.json")
@_with_choices
def bench_cli(as_json: bool, rounds: int, directory: Path | None) -> int:
    """Measure what a command costs beside Python that does nothing and a bare click program.

    The server's machines are simulated. No image is needed.
    """
    with _needs_a_server():
        from noid_bench.command_line import measure_command_line
    return _show(measure_command_line(rounds, directory or paths.data_dir()), as_json)


@bench.command(
    name="firecracker",
    cls=Command,
    epilog="noid bench firecracker\nnoid bench firecracker --binary /opt/firecracker --json",
)
@_with_choices
@click.option("--image", metavar="IMAGE", help="The image to measure. [default, else a tiny one]")
@click.option(
    "--binary",
    metavar="PATH",
    default="firecracker",
    show_default=True,
    help="Firecracker's program.",
)
@click.option("--simulated", is_flag=True, help="A made-up Firecracker and guest: to try the bench.")
def bench_firecracker(
    as_json: bool, image: str | None, rounds: int, directory: Path | None, binary: str, simulated: bool
) -> int:
    """Measure checkpoint, create and restore on Firecracker beside bare API calls.

    The calls are those of a script, made in the same run, of the same program, with the same snapshots.
    """
    import trio

    with _needs_a_server():
        from noid_bench.firecracker import measure_firecracker
        from noid_bench.rig import MEM_MIB
    work = directory or paths.data_dir()
    figures = trio.run(measure_firecracker, None if simulated else binary, image, rounds, work)
    return _show(figures, as_json, guest_mem_mib=MEM_MIB)


@contextlib.contextmanager
def _needs_a_server() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("noid"):
            raise
        raise ConfigError(
            f"noid bench runs a server of its own, and this installation has no {error.name}. Install the rest of noid:"
            " pip install 'noid[server]'"
        ) from error


def _show(figures: list[Figure], as_json: bool, **facts: object) -> int:
    """Print the figures and return the exit status."""
    record = {
        "noid": __version__,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "host": host_facts(),
        "figures": [figure.as_json() for figure in figures],
    }
    click.echo(json.dumps(record, indent=1) if as_json else table(figures))
    return 1 if any(figure.verdict == "MISSED" for figure in figures) else 0
