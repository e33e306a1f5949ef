"""A checkpoint: a machine frozen at one instant, to go back to or to make others from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from noid.client.calls import checkpoints as calls
from noid.client.link import Link

if TYPE_CHECKING:
    from noid.client.answers import CheckpointInfo
    from noid.sdk.vm import Vm


class Checkpoint:
    """A checkpoint. *info* is what the server said of it last. It outlives its VM."""

    def __init__(self, link: Link, info: CheckpointInfo) -> None:
        self.info = info
        self._link = link

    @property
    def id(self) -> str:
        """Its id, 16 hex digits."""
        return self.info["id"]

    @property
    def vm_name(self) -> str:
        """The VM it was taken of."""
        return self.info["vm_name"]

    @property
    def label(self) -> str | None:
        """The text it was taken with."""
        return self.info["label"]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} of {self.vm_name!r}>"

    async def restore(self) -> Vm:
        """Put its VM back to it, in place. If that fails, the VM is as it was, and runs."""
        from noid.sdk.vm import Vm

        return Vm(self._link, await self._link.perform(calls.restore(self.vm_name, self.id)))

    async def fork(self, name: str, *, labels: Mapping[str, str] | None = None) -> Vm:
        """Make the VM *name* from it, which goes on where this was taken, and return it when its guest answers."""
        from noid.sdk.vm import Vm

        return Vm(self._link, await self._link.perform(calls.restore(self.vm_name, self.id, name, labels=labels)))

    async def set_labels(self, labels: Mapping[str, str | None]) -> None:
        """Give it *labels*; one that is None goes, others stay."""
        self.info = await self._link.perform(calls.label(self.vm_name, self.id, labels))

    async def remove(self) -> None:
        """Remove it. What was made from it lives on."""
        await self._link.perform(calls.remove(self.vm_name, self.id))
