"""A VM that goes when the block that uses it ends, however that ends: by itself, Ctrl+C, a signal, a lost terminal.

That is more than a ``finally``: a create that is interrupted goes on in the server, so it is waited for on a thread of
its own and cancelled there; and nothing is ever removed that this did not make, which a label of its own tells.

``kill -9`` leaves the VM. It has the label `LABEL`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any

import click

from noid.cli.finishing import Work, one_interruption
from noid.cli.friendly_names import unused
from noid.cli.new_vm import NewVm
from noid.cli.options import Call, call
from noid.cli.output import progress, say, show_timing
from noid.client.answers import VmInfo
from noid.client.calls import operations, vms
from noid.client.errors import ServerError, ServerTooOld
from noid.errors import NoidError, NotFound

LABEL = "noid.run"
REMOVAL_SECS = 30.0
SETTLE_SECS = 0.5
"""How long an interrupted create may still be refused before it is cancelled: it may not be ours that runs."""
_RETRY_SECS, _RETRY_SECS_MAX = 0.2, 2.0
_BROKEN = 500
_NEVER = frozenset({400, 401, 403})
"""Refusals that no repetition changes."""


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
        self._making: Work[VmInfo] | None = None
        self._given_up = False

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
        try:
            began = time.perf_counter()
            self._making = Work(lambda: self._make(name))
            with progress(f"Creating VM {name!r}" if name else "Creating a VM"):
                made = self._making.result()
        except BaseException:
            self._given_up = True
            raise
        if self._invocation.timing:
            show_timing(made.get("timings", {}), time.perf_counter() - began, "create")

    def _make(self, name: str | None) -> VmInfo:
        def attempt(candidate: str) -> VmInfo:
            if self._given_up:
                raise NotFound("nobody wants it any more")
            self._name = candidate
            return self._invocation.perform(self._new.request(candidate))

        self._vm = unused(attempt) if name is None else attempt(name)
        return self._vm

    def remove(self) -> None:
        """Remove it, if it was made and shall not stay.

        Raises:
            NotRemoved: it may still be there.
        """
        if self.is_kept:
            return
        failure = self._settled()
        refused = isinstance(failure, ServerTooOld) or (isinstance(failure, ServerError) and failure.status < _BROKEN)
        if not self._name or refused:
            return  # the server says that nothing was made
        deadline, pause = time.monotonic() + REMOVAL_SECS, _RETRY_SECS
        while True:
            try:
                self._destroy()
            except NotRemoved:
                raise
            except NoidError as error:
                status = getattr(error, "status", 0)
                if status == NotFound.status:
                    return
                if status in _NEVER or time.monotonic() > deadline:
                    raise NotRemoved(self._name, str(error)) from error
            else:
                return
            time.sleep(pause)
            pause = min(2 * pause, _RETRY_SECS_MAX)

    def _settled(self) -> BaseException | None:
        """Come to know whether it was made, and return why not. A create under way is cancelled, which undoes it."""
        if self._making is None:
            return None
        if self._making.has_ended(SETTLE_SECS):
            return self._making.failure
        with contextlib.suppress(NoidError):  # a server that cannot cancel finishes it, which is waited for
            for each in self._quickly(operations.every(vm=self._name, state="running")):
                self._quickly(operations.cancel(each["id"]))
        if not self._making.has_ended(REMOVAL_SECS):
            raise NotRemoved(self._name, "it is still being made")
        return self._making.failure

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
    with one_interruption("Removing the VM; Ctrl+C again leaves it.") as removing:
        try:
            throwaway.make(name)
            yield throwaway
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
            Work(throwaway.remove).result()
        except NotRemoved as error:
            problem = str(error)
        except KeyboardInterrupt:
            problem = f"VM {throwaway.name!r} may still be there. Remove it with: noid destroy {throwaway.name}"
    if problem is not None:
        with contextlib.suppress(OSError):
            say(f"Error: {problem}")
