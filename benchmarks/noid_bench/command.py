"""``noid bench``: measures noid on this machine and says whether it keeps its promises.

What measures is imported when it runs: ``noid --help`` works without what only a server needs.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import click

from noid import __version__
from noid.cli.options import Command
from noid.core import paths
from noid.errors import ConfigError
from noid_bench.report import host_facts, table


@click.command(cls=Command, epilog="noid bench\nnoid bench --json --rounds 20 > before.json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--image", metavar="IMAGE", help="The image to measure. [default, else a tiny one]")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1, 1000), help="Samples for each figure.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Where to work. [the data directory]")
def bench(as_json: bool, image: str | None, rounds: int, directory: Path | None) -> int:
    """Measure noid beside the raw floor of this machine.

    Every figure with a floor is a ratio to what a bare script takes for the same, measured in the same run. The exit
    status is 1 when a "must" is missed.
    """
    import trio

    try:
        from noid_bench.rig import MEM_MIB
        from noid_bench.run import measure
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("noid"):
            raise
        raise ConfigError(
            f"noid bench runs a server of its own, and this installation has no {error.name}. Install the rest of noid:"
            " pip install 'noid[server]'"
        ) from error
    figures = trio.run(measure, image, rounds, directory or paths.data_dir())
    record = {
        "noid": __version__,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "guest_mem_mib": MEM_MIB,
        "host": host_facts(),
        "figures": [figure.as_json() for figure in figures],
    }
    click.echo(json.dumps(record, indent=1) if as_json else table(figures))
    return 1 if any(figure.verdict == "MISSED" for figure in figures) else 0
