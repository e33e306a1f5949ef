"""Ctrl+C and SIGTERM while a guest's command runs in the foreground: they are the command's, as if it ran here."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from noid.cli.output import say
from noid.errors import NoidError

AGAIN_SECS = 2.0
"""A second one within that time is meant for us: the command did not end by the first."""


@contextlib.contextmanager
def passed_on(send: Callable[[str], bool]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on while the block runs. What was ignored stays ignored.

    *send* gets ``INT`` or ``TERM``, in a thread of its own, so that neither a guest whose output nobody reads nor an
    agent that does not answer is in the way; it returns whether there was anything to send it to. When there was not,
    when it fails, and for a second signal within `AGAIN_SECS`, the block ends with KeyboardInterrupt or SystemExit.
    """
    sent_at = -AGAIN_SECS
    gave_up = False

    def deliver(signo: signal.Signals) -> None:
        nonlocal gave_up
        try:
            if send(signo.name.removeprefix("SIG")):
                return
        except NoidError as error:
            say(f"Warning: the command could not be sent {signo.name}: {error}")
        gave_up = True
        os.kill(os.getpid(), signo)

    def handle(signo: int, _: FrameType | None) -> None:
        nonlocal sent_at
        now = time.monotonic()
        if not gave_up and now - sent_at >= AGAIN_SECS:
            import threading

            sent_at = now
            threading.Thread(target=deliver, args=(signal.Signals(signo),), daemon=True).start()
        elif signo == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + signo)

    taken = [signo for signo in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signo) is not signal.SIG_IGN]
    before = {signo: signal.signal(signo, handle) for signo in taken}
    try:
        yield
    finally:
        for signo, handler in before.items():
            signal.signal(signo, handler)
