"""Runs the promises of VMMs where KVM works: in a level-1 guest with an emulated SVM, on any x86_64 machine.

Usage: scripts/rig [--quick] [--write-table] [-- PYTEST ARGUMENTS]
       scripts/rig --bench

Without arguments: the conformance suite of QEMU with KVM, and with ``NOID_FIRECRACKER=/path/to/firecracker``, a static
binary, that of Firecracker. That takes about ten minutes each, because level 1 is emulated; with ``--quick``, a few
tests of each. Ends with a table of what was kept; ``--write-table`` puts it on docs/conformance.md. ``--bench`` runs
``noid bench firecracker`` there instead: its ratios are those of a processor on which Python is several times slower.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from noid.errors import NoidError
from noid.testing.level1 import ROOT, Level1, level1
from noid.testing.results import Row, read, table, together, write_page

PAGE = ROOT / "docs" / "conformance.md"
PYTEST = ("python3", "-m", "pytest", "-p", "no:cacheprovider", "-v")
BENCH = (
    'mkdir -p "$HOME/bench" && NOID_DATA_DIR="$HOME/bench" exec '
    'python3 -m noid.cli.main bench firecracker --rounds 12 --binary "$NOID_FIRECRACKER"'
)
QUICK = "clone_wakes or powers_off or adopts_a_machine_as or tells_its_status"
QEMU = ("tests/conformance/test_vmm_qemu.py",)
FIRECRACKER = (
    "tests/conformance/test_vmm_firecracker.py::TestFirecracker",
    "tests/vmm_firecracker/test_real_firecracker.py",
)


def main() -> int:
    """Run them and return 0 if all was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few tests of each, some minutes")
    parser.add_argument("--bench", action="store_true", help="noid bench firecracker, some minutes")
    parser.add_argument("--write-table", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="of a run elsewhere: add it to the table",
    )
    parser.add_argument("pytest", nargs="*", help="run this instead, in level 1")
    wanted = parser.parse_args()
    given = os.environ.get("NOID_FIRECRACKER")
    if wanted.bench and not given:
        parser.error("--bench needs NOID_FIRECRACKER=/path/to/firecracker")
    runs: list[tuple[str, ...]] = [tuple(wanted.pytest)] if wanted.pytest else [QEMU]
    if not wanted.pytest:
        if given:
            runs.append(FIRECRACKER)
        else:
            print("Firecracker: skipped, NOID_FIRECRACKER is not set to the path of one.")
        if wanted.quick:
            runs = [("-k", QUICK, *run) for run in runs]
    try:
        with level1(said) as guest:
            with said("carrying the checkout to level 1"):
                guest.carry(firecracker=Path(given) if given else None)
            if wanted.bench:
                return guest.run(["sh", "-c", BENCH])
            statuses, rows = run_all(guest, runs)
    except NoidError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    rows = together([rows, *(read(file.read_text()) for file in wanted.results)])
    print(f"\n{table(rows)}")
    if wanted.write_table:
        write_page(PAGE, rows)
        print(f"Written: {PAGE}")
    return max(statuses)


def run_all(guest: Level1, runs: list[tuple[str, ...]]) -> tuple[list[int], list[Row]]:
    """Run pytest in *guest* with each of *runs*; return its statuses and what the table says of all."""
    statuses, results = [], []
    for number, arguments in enumerate(runs):
        file = f"/tmp/results-{number}.json"  # noqa: S108  # level 1's, which is gone in a moment
        statuses.append(guest.run([*PYTEST, f"--results={file}", *arguments]))
        results.append(read(guest.read(file).decode()))
    return statuses, together(results)


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    began = time.monotonic()
    print(f"{what} ...", flush=True)
    yield
    print(f"    {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
