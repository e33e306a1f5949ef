"""What has to be finished or undone whatever interrupts a command: work that can be waited for again, and signals.

Signals come in pairs: a session that ends sends SIGTERM and SIGHUP, people press Ctrl+C twice. So only the first one
interrupts anything, and what is to be finished after it is left only when somebody insists.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Generic, TypeVar

T = TypeVar("T")

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Work(Generic[T]):
    """*function*, on a thread of its own: who waits for it can be interrupted, it cannot, and so its end is known."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._outcome: T | None = None
        self.failure: BaseException | None = None
        # Not Thread.join: one that is interrupted takes the thread for ended (Python 3.11).
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._outcome = self._function()
        except BaseException as failure:  # noqa: ASYNC103  # `result` raises it
            self.failure = failure
        finally:
            self._ended.set()

    def has_ended(self, secs: float | None = None) -> bool:
        """Wait for its end, for *secs* at most, and return whether that has come."""
        return self._ended.wait(secs)

    def result(self) -> T:
        """Wait for its end, and return or raise what it has."""
        self._ended.wait()
        if self.failure is not None:
            raise self.failure
        return self._outcome  # type: ignore[return-value]  # it has ended, and not by a failure


@contextlib.contextmanager
def one_interruption(warning: str) -> Iterator[Callable[[], None]]:
    """Have the first signal that ends processes end the block as an exception; what was ignored stays ignored.

    What is yielded is to be called when the block is about to finish what it has begun. From then on, and after that
    first signal, only Ctrl+C does anything: once it prints *warning*, then it is a KeyboardInterrupt again.
    """
    finishing = False
    insisted = 0

    def end(signo: int, _: FrameType | None) -> None:
        nonlocal insisted
        if not finishing:
            begin_finishing()  # at once: the next signal may wait already, and be handled before anything else happens
            raise KeyboardInterrupt if signo == signal.SIGINT else SystemExit(128 + signo)
        if signo == signal.SIGINT:
            insisted += 1
            if insisted > 1:
                raise KeyboardInterrupt
            with contextlib.suppress(OSError):  # the terminal may be lost
                os.write(2, f"\r\n{warning}\r\n".encode())

    def begin_finishing() -> None:
        nonlocal finishing
        finishing = True

    heeded = [signo for signo in _ENDING if signal.getsignal(signo) is not signal.SIG_IGN]
    before = {signo: signal.signal(signo, end) for signo in heeded}
    try:
        yield begin_finishing
    finally:
        for signo, handler in before.items():
            signal.signal(signo, handler)
