"""``noid cp``: files and directories into VMs, out of them, and from one to another."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator

import click

from noid.cli.options import call, command
from noid.cli.output import printable, show
from noid.client.copying import Copying
from noid.client.files import GuestPath
from noid.client.unpacking import Limits
from noid.core.model.names import checked_name

STDIN_FD, STDOUT_FD = 0, 1
PARTIAL = 1
PROGRESS_SECS = 0.5


@command(
    examples="""
noid cp notes.txt web:/srv/
noid cp web:/var/log ./log
noid cp web:/etc/. etc           (its contents)
noid cp web:/srv copy:/srv
tar c . | noid cp - web:/srv     (a tar stream; - as the target gives one)
""",
)
@click.argument("source")
@click.argument("target")
@click.option("-u", "--user", metavar="USER", help="As this user of the guest, not the image's default.")
@click.option("-a", "--archive", is_flag=True, help="Keep owners too, where root writes.")
@click.option("--resume", is_flag=True, help="Go on with what a broken copy has left of a file.")
@click.option(
    "--max-bytes", type=click.IntRange(min=0), default=64 << 30, metavar="N", help="Out of a VM, at most; 64 GiB."
)
@click.option(
    "--max-entries", type=click.IntRange(min=0), default=1_000_000, metavar="N", help="Out of a VM, at most; a million."
)
def cp(
    source: str, target: str, user: str | None, archive: bool, resume: bool, max_bytes: int, max_entries: int
) -> int:
    """Copy files and directories into, out of and between VMs.

    VM:PATH is one in a VM, - a tar stream.

    Times, modes, links and holes are kept. Exit code 1 if something was left out; stderr names it.
    """
    begin, end = _place(source, user), _place(target, user)
    meter = _Meter()
    copying = Copying(
        endpoint=call().endpoint,
        owners=archive,
        resume=resume,
        limits=Limits(entries=max_entries, size=max_bytes),
        on_progress=meter.tick,
    )
    try:
        if isinstance(begin, GuestPath):
            if isinstance(end, GuestPath):
                copying.between_guests(begin, end)
            elif end == "-":
                copying.stream_out_of_guest(begin, _write)
            else:
                copying.out_of_guest(begin, end)
        elif not isinstance(end, GuestPath):
            raise click.UsageError("neither side is in a VM. Write VM:PATH for the one that is.")
        elif begin == "-":
            copying.stream_into_guest(_standard_input(), end)
        else:
            copying.into_guest(begin, end)
    finally:
        meter.clear()
    done = copying.done
    for line in done.left_out:
        click.echo(f"left out: {printable(line)}", err=True)
    if end != "-":
        things = "1 file" if done.sha256 else "1 entry" if done.entries == 1 else f"{done.entries} entries"
        digest = f", SHA-256 {done.sha256}" if done.sha256 else ""
        show(dataclasses.asdict(done), f"Copied {things}, {done.size} bytes{digest}")
    return PARTIAL if done.left_out else 0


def _place(text: str, user: str | None) -> GuestPath | str:
    """Return what *text* means: ``VM:PATH``, unless a slash comes before the colon."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or not name:
        return text
    if not path:
        raise click.UsageError(f"{text!r} names no path. Write {name}:. for the user's home there.")
    return GuestPath(vm=checked_name(name), path=path, user=user)


def _standard_input() -> Iterator[bytes]:
    while data := os.read(STDIN_FD, 1 << 18):
        yield data


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(STDOUT_FD, view) :]


class _Meter:
    """Shows on a terminal how far it is; nothing else sees anything."""

    def __init__(self) -> None:
        self._wanted = sys.stderr is not None and sys.stderr.isatty()
        self._began = self._said = time.monotonic()
        self._shown = False

    def tick(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if not self._wanted or now - self._said < PROGRESS_SECS:
            return
        self._said, self._shown = now, True
        share = f" {100 * done // total} %" if total else ""
        rate = done / 1e6 / max(now - self._began, 0.001)
        sys.stderr.write(f"\r{done / 1e6:.1f} MB{share}, {rate:.1f} MB/s\x1b[K")
        sys.stderr.flush()

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
