"""Cleans up after a test session that was killed: waits for the end of its standard input, then ends what is left.

VMMs outlive their agent on purpose, so they would outlive a killed pytest too. This process is started beside it, in a
session of its own, with a pipe as standard input whose other end only pytest holds; the kernel closes that when
pytest ends, however it ends.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from noid.core.paths import run_dir
from noid.testing.processes import kill_marked
from noid.vmmhost.cgroups import clear

_BOOTSTRAP = "import sys; sys.path.append(sys.argv.pop(1)); from noid.testing.reaper import main; main()"


def start_reaper(root: Path) -> subprocess.Popen[bytes]:
    """Start a process that, once its stdin is closed, kills all that carries a data directory below *root*."""
    package = str(Path(__file__).parents[2])
    argv = [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, package, str(root)]
    # Not pytest's output: whoever reads that shall see its end when pytest ends.
    quiet = subprocess.DEVNULL
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True, cwd="/")


def mounts_below(root: Path) -> list[str]:
    """Return the mount points below *root*, innermost first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return sorted((point for point in points if point.startswith(f"{root}/")), key=len, reverse=True)


def clean(root: Path) -> None:
    """End every process of *root*, take away its mounts, and remove it."""
    kill_marked(root)
    for point in mounts_below(root):
        subprocess.run(["umount", "-l", point], check=False)
    clear(_run_dirs(root))
    shutil.rmtree(root, ignore_errors=True)


def _run_dirs(root: Path) -> Iterator[Path]:
    """Yield what may have been run directories of agents in *root* and its directories."""
    for directory in (root, *(entry for entry in root.glob("*/") if entry.is_dir())):
        yield from {directory, directory / "run", run_dir(directory)}


def main() -> None:
    """Wait, then clean the directory of the first argument."""
    sys.stdin.buffer.read()
    clean(Path(sys.argv[1]))
