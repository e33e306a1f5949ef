"""A VM that goes when the block that uses it ends, however that ends: by itself, Ctrl+C, a signal, a lost terminal.

Two things make that harder than a ``finally``. A create that is interrupted goes on in the server, so it is waited for
on a thread of its own and cancelled there; nothing is ever removed that this did not make, which a label of its own
tells. And signals come in pairs (a session that ends sends SIGTERM and SIGHUP, people press Ctrl+C twice), so only the
first of them interrupts anything, until somebody insists.

``kill -9`` leaves the VM. It has the label `LABEL`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import click

from noid.cli.friendly_names import unused
from noid.cli.new_vm import NewVm
from noid.cli.options import Call, call
from noid.cli.output import progress, show_timing
from noid.client.answers import VmInfo
from noid.client.calls import operations, vms
from noid.client.errors import ConnectionFailed, ServerError
from noid.errors import NoidError, NotFound

LABEL = "noid.run"
REMOVAL_SECS = 30.0
SETTLE_SECS = 0.5
"""How long an interrupted create may still be refused before it is cancelled: it may not be ours that runs."""
_RETRY_SECS, _RETRY_SECS_MAX = 0.2, 2.0
_BROKEN = 500
_NEVER = frozenset({400, 401, 403})
"""Refusals that no repetition changes."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class NotRemoved(NoidError):
    """The VM may still be there; says which one and how to remove it."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"VM {name!r} may still be there: {why}. Remove it with: noid destroy {name}")


class Throwaway:
    """The VM of one `throwaway_vm`."""

    def __init__(self, invocation: Call, new: NewVm, *, kept: bool) -> None:
        self._invocation = invocation
        self._mark = os.urandom(8).hex()
        self._new = new if kept else dataclasses.replace(new, labels={**new.labels, LABEL: self._mark})
        self._kept = kept
        self._name = ""
        self._vm: VmInfo | None = None
        self._failure: BaseException | None = None
        self._given_up = False
        self._begun = False
        self._settled = threading.Event()  # not Thread.join: one that is interrupted takes the thread for ended (3.11)

    @property
    def name(self) -> str:
        """Its name, once it is there."""
        return self._name

    @property
    def is_kept(self) -> bool:
        """Whether it stays. One that was never handed out does not."""
        return self._kept and self._vm is not None

    def keep(self) -> None:
        """Let it live on."""
        self._kept = True

    def make(self, name: str | None) -> None:
        """Make it, called *name* or something new, and wait until it answers.

        Raises:
            NoidError: it cannot be made.
        """
        maker = threading.Thread(target=self._make, args=(name,), daemon=True)
        try:
            self._begun, began = True, time.perf_counter()
            maker.start()
            with progress(f"Creating VM {name!r}" if name else "Creating a VM"):
                self._settled.wait()
        except BaseException:
            self._given_up = True
            raise
        if self._failure is not None:
            raise self._failure
        if self._invocation.timing:
            phases = self._vm.get("timings", {}) if self._vm else {}
            show_timing(phases, time.perf_counter() - began, "create")

    def _make(self, name: str | None) -> None:
        def attempt(candidate: str) -> VmInfo:
            if self._given_up:
                raise NotFound("nobody wants it any more")
            self._name = candidate
            return self._invocation.perform(self._new.request(candidate))

        try:
            self._vm = unused(attempt) if name is None else attempt(name)
        except BaseException as failure:  # noqa: ASYNC103  # who waits for this thread raises it
            self._failure = failure
        finally:
            self._settled.set()

    def remove(self) -> None:
        """Remove it, if it was made and shall not stay.

        Raises:
            NotRemoved: it may still be there.
        """
        if self.is_kept:
            return
        self._settle()
        if not self._name or (isinstance(self._failure, ServerError) and self._failure.status < _BROKEN):
            return  # refused: the server says that nothing was made
        deadline, pause = time.monotonic() + REMOVAL_SECS, _RETRY_SECS
        while True:
            try:
                self._destroy()
            except (ServerError, ConnectionFailed) as error:
                status = getattr(error, "status", 0)
                if status == NotFound.status:
                    return
                if status in _NEVER or time.monotonic() > deadline:
                    raise NotRemoved(self._name, str(error)) from error
            else:
                return
            time.sleep(pause)
            pause = min(2 * pause, _RETRY_SECS_MAX)

    def _settle(self) -> None:
        """Come to know whether it was made. A create under way is cancelled, which undoes it."""
        if not self._begun or self._settled.wait(SETTLE_SECS):
            return
        with contextlib.suppress(NoidError):  # a server that cannot cancel finishes it, which is waited for
            for each in self._quickly(operations.every(vm=self._name, state="running")):
                self._quickly(operations.cancel(each["id"]))
        if not self._settled.wait(REMOVAL_SECS):
            raise NotRemoved(self._name, "it is still being made")

    def _destroy(self) -> None:
        if self._vm is None:  # the connection was lost meanwhile: what is there may be somebody else's of that name
            labels = self._quickly(vms.get(self._name)).get("labels")
            if labels is None or self._kept:
                raise NotRemoved(self._name, "nobody knows whether it was made, or had been there before")
            if labels.get(LABEL) != self._mark:
                return
        self._quickly(vms.destroy(self._name))

    def _quickly(self, request: Any) -> Any:
        """Perform *request*, with an end to waiting: there may be nobody left who could press Ctrl+C."""
        return self._invocation.perform(dataclasses.replace(request, quick=True))


@contextlib.contextmanager
def throwaway_vm(new: NewVm, name: str | None, *, kept: bool) -> Iterator[Throwaway]:
    """Make a VM for the block, called *name* or something new, and remove it afterwards unless it is *kept*.

    That it could not be removed is said on stderr, and changes nothing of how the block ended.

    Raises:
        NoidError: it cannot be made. Nothing is left of it.
    """
    throwaway = Throwaway(call(), new, kept=kept)
    with _signals() as removing:
        try:
            try:
                throwaway.make(name)
                yield throwaway
            finally:
                removing()
        finally:
            removing()
            _remove(throwaway)


def _remove(throwaway: Throwaway) -> None:
    if throwaway.is_kept:
        if not call().quiet:
            click.echo(f"VM {throwaway.name!r} is kept. Remove it with: noid destroy {throwaway.name}", err=True)
        return
    problem: str | None = None
    with contextlib.suppress(OSError), progress(f"Removing VM {throwaway.name!r}"):  # the terminal may be lost
        try:
            throwaway.remove()
        except NotRemoved as error:
            problem = str(error)
        except KeyboardInterrupt:
            problem = f"VM {throwaway.name!r} may still be there. Remove it with: noid destroy {throwaway.name}"
    if problem is not None:
        with contextlib.suppress(OSError):
            click.echo(f"Error: {problem}", err=True)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Have signals end the block as exceptions. What is yielded says that it has ended, and what is left is to remove.

    From then on only Ctrl+C does anything, and only the second time.
    """
    removing = False
    insisted = 0

    def end(signo: int, _: FrameType | None) -> None:
        nonlocal insisted
        if not removing:
            raise KeyboardInterrupt if signo == signal.SIGINT else SystemExit(128 + signo)
        if signo == signal.SIGINT:
            insisted += 1
            if insisted > 1:
                raise KeyboardInterrupt
            with contextlib.suppress(OSError):
                os.write(2, b"\r\nRemoving the VM; Ctrl+C again leaves it.\r\n")

    def now_removing() -> None:
        nonlocal removing
        removing = True

    # What is ignored stays so: that is what nohup, or a shell without job control, wants.
    heeded = [signo for signo in _ENDING if signal.getsignal(signo) is not signal.SIG_IGN]
    before = {signo: signal.signal(signo, end) for signo in heeded}
    try:
        yield now_removing
    finally:
        for signo, handler in before.items():
            signal.signal(signo, handler)
