"""Asking a VMM's program for something it answers by itself: its version, or how a trial guest fares."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import trio

_NO_PROGRAM = 127
"""What a shell ends with for a program that cannot be run."""


async def answer_of(argv: Sequence[str], deadline_secs: float, stdin: bytes = b"") -> tuple[int, str] | None:
    """Run a short program and return its status, negative for a signal, with all it printed; None if it was killed.

    Blocking work on ``/dev/kvm`` can make killing it take a moment.
    """
    with trio.move_on_after(deadline_secs):
        try:
            done = await trio.run_process(
                argv, stdin=stdin, capture_stdout=True, stderr=subprocess.STDOUT, check=False, deliver_cancel=_kill
            )
        except OSError as error:
            return _NO_PROGRAM, str(error)
        return done.returncode, done.stdout.decode(errors="replace")
    return None


async def _kill(process: trio.Process) -> None:
    process.kill()
