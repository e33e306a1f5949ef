"""A VM for the length of a block."""

from __future__ import annotations

from types import TracebackType

from noid.client.answers import VmInfo
from noid.client.calls import vms
from noid.client.calls.call import Call
from noid.client.errors import ServerError
from noid.client.link import Link
from noid.errors import NotFound
from noid.sdk.making import UNDO_SECS, made
from noid.sdk.vm import Vm


class Temporary:
    """Makes a VM when it is entered, and destroys it when it is left."""

    def __init__(self, link: Link, create: Call[VmInfo]) -> None:
        self._link, self._create = link, create
        self._vm: Vm | None = None

    async def __aenter__(self) -> Vm:
        """Make the VM."""
        info = await made(self._link, self._create, lambda vm: vms.destroy(vm["name"]))
        self._vm = Vm(self._link, info)
        return self._vm

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Destroy it, unless that was done."""
        if self._vm is None:
            return
        with self._link.waiting.shielded(UNDO_SECS):
            try:
                await self._vm.destroy()  # noqa: ASYNC102  # shielded and bounded above
            except ServerError as refused:
                if refused.status != NotFound.status:
                    raise
