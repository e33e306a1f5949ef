"""Lets every call that is made of a simulated Firecracker go wrong in every way, and every agent be killed at it.

Usage: scripts/firecracker-faults [WORDS...]

With WORDS only the cases with all of them in their names, as in ``scripts/firecracker-faults checkpoint hang``. Takes
six minutes. What must hold is said in `noid.testing.firecracker_faults`. Exit code 1 when it did not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import trio

from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.firecracker_faults import Case, FaultWorld, Place, cases, impatient
from noid.testing.reaper import clean, start_reaper


def main() -> int:
    """Go through them and say how each went."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("words", nargs="*")
    words = options.parse_args().words
    root = Path(tempfile.mkdtemp(prefix="noid-f-"))
    reaper = start_reaper(root)
    failed = 0
    try:
        with impatient():
            world, places = _world(root)
            swept = [*cases(places, kill=False), *cases(places, kill=True)]
            chosen = [case for case in swept if all(word in str(case) for word in words)]
            for case in chosen:
                started = time.perf_counter()
                try:
                    _strike(world, case)
                except AssertionError as error:
                    failed += 1
                    print(f"FAILED after {time.perf_counter() - started:.1f} s: {error}", flush=True)
                    world, _ = _world(root)
                else:
                    print(f"{time.perf_counter() - started:5.1f} s  {case}", flush=True)
    finally:
        reaper.communicate(timeout=60)
    print(f"{len(chosen)} cases, {failed} failed")
    return 1 if failed else 0


def _world(root: Path) -> tuple[FaultWorld, list[Place]]:
    """Return a new world below *root*, instead of whatever there was, and every call in it."""
    clean(root)
    (agent_dir := root / "agent").mkdir(parents=True)
    world = FaultWorld(agent_dir, SimulatedFirecracker(root / "program"))
    return world, trio.run(world.prepare)


def _strike(world: FaultWorld, case: Case) -> None:
    if case.what == "kill":
        world.kill(case)
    else:
        trio.run(world.strike, [case])


if __name__ == "__main__":
    raise SystemExit(main())
