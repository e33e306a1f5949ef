"""The tour of the quickstart: runs noid's commands as a user would, prints each with its time, and checks every claim.

Usage: scripts/tour.py [--mem MIB]. Ends with status 0 only if everything that is said was seen. The VMs it makes it
removes, also when something fails; its checkpoint stays, as checkpoints do.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from noid.core import paths

NOID = Path(sys.executable).with_name("noid")
VM, COPIES = "tour", ("tour-copy-1", "tour-copy-2")
COUNTER = "/dev/shm/tour-counter"  # noqa: S108  # in the guest
NOTE = "note.txt"
#: Counts in memory, ten times a second, in a session of its own so that it outlives the command that starts it.
COUNT = (
    f"echo $$ > {COUNTER}.pid; n=0; "
    f"while :; do n=$((n+1)); echo $n > {COUNTER}.new; mv {COUNTER}.new {COUNTER}; sleep 0.1; done"
)
DEADLINE_SECS = 600


class Unproved(Exception):
    """A claim of the tour did not hold."""


def noid(*arguments: str, show: bool = True) -> str:
    """Run a noid command, print it with its time, and return what it printed."""
    started = time.perf_counter()
    command = [str(NOID), *arguments]
    if show:
        print(f"  $ noid {shlex.join(arguments)} ", end="", flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_SECS)
    except subprocess.TimeoutExpired as error:
        raise Unproved(f"noid {shlex.join(arguments)} has not ended after {DEADLINE_SECS} s") from error
    if show:
        took = f"({time.perf_counter() - started:.2f} s)"
        print(f"\033[2m{took}\033[0m" if sys.stdout.isatty() else took)
        for line in done.stdout.rstrip().splitlines()[:12]:
            print(f"    {line}")
    if done.returncode != 0:
        raise Unproved(f"noid {shlex.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def guest(vm: str, script: str, *, show: bool = True) -> str:
    """Run a shell script in a VM and return its output, stripped."""
    return noid("exec", vm, "--", "sh", "-c", script, show=show).strip()


def say(text: str) -> None:
    """Print a headline."""
    print(f"\n{text}", flush=True)


def check(claim: str, holds: bool, facts: str) -> None:
    """Print *claim* as proved.

    Raises:
        Unproved: it does not hold; carries *facts*.
    """
    if not holds:
        raise Unproved(f"{claim}: NOT TRUE ({facts})")
    print(f"    ok: {claim} ({facts})")


def counter(vm: str) -> int:
    """Return the number the process in the guest's memory has reached."""
    return int(guest(vm, f"cat {COUNTER}", show=False))


def tour(mem_mib: int) -> None:
    """Show create, exec, checkpoint, restore in place, clone, list, destroy."""
    say("1. A real Linux VM. The first of its shape boots once; every later one wakes from that.")
    noid("create", VM, "--mem", str(mem_mib))
    kernel = guest(VM, "uname -sr; cat /proc/1/comm")
    check("it runs a Linux kernel of its own", kernel.startswith("Linux"), kernel.replace("\n", ", PID 1 is "))

    say("2. Something in its memory (a counting process) and something on its disk (a file).")
    guest(VM, f"setsid sh -c {shlex.quote(COUNT)} > /dev/null 2>&1 < /dev/null & echo before > ~/{NOTE}; sync")
    until = time.monotonic() + 60
    while guest(VM, f"cat {COUNTER} 2> /dev/null || true", show=False) == "":
        if time.monotonic() > until:
            raise Unproved("the counter did not start within 60 s")

    say("3. A checkpoint: memory, processes, disk, at one instant.")
    at_least = counter(VM)
    checkpoint = json.loads(noid("checkpoint", VM, "--label", "before", "--json", show=False))
    print(f"  $ noid checkpoint {VM} --label before\n    Checkpoint '{checkpoint['id']}' created (label: before)")
    at_most = counter(VM)
    pause = checkpoint.get("timings", {}).get("pause")
    if pause is not None:
        print(f"    the guest stood still for {pause * 1000:.1f} ms")

    say("4. Change both: kill the process, overwrite the file.")
    guest(VM, f"kill $(cat {COUNTER}.pid); rm {COUNTER}*; echo after > ~/{NOTE}")
    check("the file has changed", guest(VM, f"cat ~/{NOTE}", show=False) == "after", "it says 'after'")

    say("5. Restore in place: both are as they were, and the process goes on from where it was.")
    noid("restore", VM, checkpoint["id"])
    number = counter(VM)
    check(
        "the process counts on from the checkpoint's number",
        number >= at_least,
        f"checkpoint {at_least}..{at_most}, now {number}",
    )
    check("the file is the old one", guest(VM, f"cat ~/{NOTE}", show=False) == "before", "it says 'before'")

    say("6. Two clones of the same instant, each with an identity of its own.")
    for copy in COPIES:
        noid("restore", VM, checkpoint["id"], "--as", copy)
    everyone = (VM, *COPIES)
    for copy in COPIES:
        number = counter(copy)
        check(f"{copy} counts on from the checkpoint's number", number >= at_least, f"now {number}")
        check(f"{copy} has the file", guest(copy, f"cat ~/{NOTE}", show=False) == "before", "it says 'before'")
    for what, script in (
        ("hostname", "cat /proc/sys/kernel/hostname"),
        ("machine-id", "cat /etc/machine-id"),
        ("randomness", "cat /proc/sys/kernel/random/uuid"),
    ):
        found = [guest(vm, script, show=False) for vm in everyone]
        check(f"the {what} of all three differs", len(set(found)) == len(everyone), ", ".join(found))
    clocks = [abs(float(guest(vm, "date +%s", show=False)) - time.time()) for vm in everyone]
    check("their clocks are right", max(clocks) < 5, f"off by at most {max(clocks):.1f} s")

    say("7. What there is, and away with it.")
    noid("list")
    for vm in everyone:
        noid("destroy", vm)
    left = {vm["name"] for vm in json.loads(noid("list", "--json", show=False))} & set(everyone)
    check("all three are gone", not left, "noid list does not name them")
    kept = json.loads(noid("checkpoints", VM, "--json", show=False))
    check("the checkpoint outlives its VM", checkpoint["id"] in {c["id"] for c in kept}, checkpoint["id"])


@contextlib.contextmanager
def only_tour() -> Iterator[None]:
    """Wait until no other tour uses this data directory: the names of its VMs are the same in all of them."""
    directory = os.open(paths.data_dir(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another tour is under way; waiting for it.", flush=True)
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def remove_vms() -> None:
    """Remove the tour's VMs, as far as there are any."""
    for vm in (VM, *COPIES):
        with contextlib.suppress(Unproved):
            noid("destroy", vm, show=False)


def main() -> int:
    """Run the tour and return the exit status."""
    parser = argparse.ArgumentParser(description="Show what noid does, and check it.")
    parser.add_argument("--mem", type=int, default=512, help="memory of the VM in MiB (512)")
    arguments = parser.parse_args()
    os.chdir("/")  # a .noid-vm file here must not matter
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # it is a text file
    paths.data_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
    with only_tour():
        started = time.monotonic()
        remove_vms()  # of a tour that was killed
        try:
            tour(arguments.mem)
        except Unproved as error:
            print(f"\nFAILED: {error}\nThe agent's log is {paths.data_dir() / 'agent.log'}.", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nInterrupted. Removing the tour's VMs.", file=sys.stderr)
            return 130
        finally:
            remove_vms()
    print(f"\nEverything above was checked. The tour took {time.monotonic() - started:.1f} s.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
