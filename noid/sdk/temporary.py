"""A VM for the length of a block."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from noid.client.answers import VmInfo
from noid.client.calls import vms
from noid.client.calls.call import Call, raw, with_query
from noid.client.errors import ConnectionFailed, ServerError
from noid.client.link import Link
from noid.errors import Conflict, NotFound
from noid.sdk.vm import Vm

DESTROY_SECS = 60.0
_CANCEL_WAIT_SECS = 30


class Temporary:
    """Makes a VM when it is entered, and destroys it when it is left."""

    def __init__(self, link: Link, name: str, create: Call[VmInfo]) -> None:
        self._link, self._name, self._create = link, name, create
        self._vm: Vm | None = None

    async def __aenter__(self) -> Vm:
        """Make the VM."""
        try:
            self._vm = Vm(self._link, await self._link.perform(self._create))
        except ServerError:
            raise  # which made nothing
        except BaseException:
            # The server goes on making what nobody waits for any more.
            with self._link.waiting.shielded(DESTROY_SECS):
                await self._undo()
            raise
        return self._vm

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Destroy it, unless that was done."""
        if self._vm is not None:
            with self._link.waiting.shielded(DESTROY_SECS):
                await self._destroy(self._vm.name)

    async def _destroy(self, name: str) -> None:
        try:
            await self._link.perform(vms.destroy(name))
        except ServerError as error:
            if error.status != NotFound.status:
                raise

    async def _undo(self) -> None:
        """Cancel what makes the VM, and destroy it if it was too late for that. Without an agent nothing goes on."""
        try:
            for operation in await self._under_way():
                at = f"/v1/operations/{operation['id']}"
                try:
                    await self._link.perform(raw("POST", f"{at}/cancel"))
                except ServerError as error:
                    if error.status != Conflict.status:  # it has just ended
                        raise
                await self._link.perform(raw("GET", with_query(at, wait=_CANCEL_WAIT_SECS)))
            await self._destroy(self._name)
        except ConnectionFailed:
            return

    async def _under_way(self) -> list[dict[str, Any]]:
        try:
            found = await self._link.perform(raw("GET", with_query("/v1/operations", vm=self._name, state="running")))
        except ServerError as error:
            if error.status != NotFound.status:  # a server before 0.3.0
                raise
            return []
        return list(found)
