"""What a user may have: limits from ``[quota]`` and of single users, held where something is reserved, and the use.

Whatever a reservation adds is counted in the transaction that makes it, so two that come at once cannot both be the
last. A VM counts from its reservation until it is gone, also while it is stopped: it can be started at any time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import trio

from noid import hostextents, hostfs
from noid.core.config.settings import LimitsConfig, QuotaConfig
from noid.core.database.store import Store, Tx
from noid.core.layout import Layout
from noid.core.model.users import User
from noid.core.model.vms import Vm
from noid.errors import InvalidRequest, QuotaExceeded

RESOURCES = tuple(field.name for field in dataclasses.fields(QuotaConfig))
"""What is counted, by the names it has in ``[quota]``, on the command line and over HTTP."""

_WORDS = {
    "vms": "VMs",
    "vcpus": "vCPUs",
    "mem_mib": "MiB of memory",
    "checkpoints": "checkpoints",
    "bytes": "bytes on disk",
    "exec_sessions": "running processes",
}
_RELIEF = {
    "checkpoints": "Delete one",
    "bytes": "Delete checkpoints or VMs",
    "exec_sessions": "End one",
}

_OWN_LIMITS = "SELECT resource, most FROM quotas WHERE owner = ?"
_USED = """SELECT count(*) AS vms, coalesce(sum(cpus), 0) AS vcpus, coalesce(sum(mem_mib), 0) AS mem_mib,
    (SELECT count(*) FROM checkpoints WHERE owner = ?1) AS checkpoints FROM vms WHERE owner = ?1"""
#: Checkpoints that are being made have a page in the journal and no row yet. Those begun later do not count.
_BEING_MADE = """SELECT count(*) FROM operations WHERE owner = ?1 AND kind = 'vm.checkpoint' AND outcome IS NULL
    AND rowid <= (SELECT max(rowid) FROM operations
        WHERE outcome IS NULL AND json_extract(facts, '$.checkpoint_id') = ?2)"""


class Quotas:
    """The limits of one data directory's users, and what they use.

    Attributes:
        host: How much of the host all users together, one VM or one client may take.
    """

    def __init__(self, store: Store, layout: Layout, defaults: QuotaConfig, host: LimitsConfig) -> None:
        self._store = store
        self._layout = layout
        self._defaults: dict[str, int | None] = dataclasses.asdict(defaults)
        self.host = host
        self._measuring: dict[str, _Measurement] = {}
        self._one_measurement = trio.CapacityLimiter(1)

    def take_up(self, defaults: QuotaConfig, host: LimitsConfig) -> None:
        """Go by these from now on. What exceeds them already stays."""
        self._defaults = dataclasses.asdict(defaults)
        self.host = host

    def limits(self, user: User) -> dict[str, int | None]:
        """Return the most *user* may have of each resource; None: as much as there is."""
        return self._merged(self._store.rows(_OWN_LIMITS, user.id))

    async def set_limits(self, user: User, changes: Mapping[str, int | None], reset: frozenset[str]) -> None:
        """Give *user* limits of their own, None for none, and the defaults again for what is in *reset*."""

        def change(tx: Tx) -> None:
            for resource in reset:
                tx.execute("DELETE FROM quotas WHERE owner = ? AND resource = ?", user.id, resource)
            for resource, most in changes.items():
                tx.execute("INSERT OR REPLACE INTO quotas VALUES (?, ?, ?)", user.id, resource, most)

        await self._store.write(change)

    async def use(self, user: User) -> dict[str, int]:
        """Return what *user* uses of each resource but processes. Bytes are measured, which may take a moment."""
        return {**dict(self._store.rows(_USED, user.id)[0]), "bytes": await self._measured(user.id)}

    # --- where something is reserved ----------------------------------------------------------------------------------

    def check_shape(self, mem_mib: int) -> None:
        """Let pass if a VM may have that much memory on this host.

        Raises:
            InvalidRequest: more than ``max_memory_per_vm``.
        """
        most = self.host.max_memory_per_vm
        if most is not None and mem_mib > most:
            raise InvalidRequest(f"mem_mib is {mem_mib}; a VM may have at most {most} on this host.")

    def reserve_vm(self, tx: Tx, vm: Vm) -> None:
        """Let pass if *vm*, whose row *tx* has just added, fits.

        Raises:
            QuotaExceeded: it does not.
        """
        most = self.host.max_vms
        if most is not None and tx.execute("SELECT count(*) FROM vms").fetchone()[0] > most:
            raise QuotaExceeded(f"this host has {most} VMs, which is the most it may have. Destroy one first.")
        self._check(tx, vm.owner, ("vms", "vcpus", "mem_mib"))

    def reshape_vm(self, tx: Tx, owner: str) -> None:
        """Let pass if *owner*'s VMs fit after one of them has got another shape in *tx*.

        Raises:
            QuotaExceeded: they do not.
        """
        self._check(tx, owner, ("vcpus", "mem_mib"))

    def reserve_checkpoint(self, tx: Tx, owner: str, checkpoint_id: str) -> None:
        """Let pass if the checkpoint fits that the journal says is being made.

        Raises:
            QuotaExceeded: it does not.
        """
        self._check(tx, owner, ("checkpoints",), being_made=checkpoint_id)

    async def check_bytes(self, owner: str) -> None:
        """Let pass if *owner* has room on the disk. How much something will take is not known before it is made.

        Raises:
            QuotaExceeded: what there is fills it.
        """
        most = self._merged(self._store.rows(_OWN_LIMITS, owner))["bytes"]
        if most is not None and (used := await self._measured(owner)) >= most:
            raise QuotaExceeded(_sentence("bytes", most, used))

    def check_process(self, user: User, count: Callable[[], int]) -> None:
        """Let pass if one more process of *user* may run. *count* tells how many do; it is asked only under a limit.

        Raises:
            QuotaExceeded: there are as many as there may be.
        """
        most = self.limits(user)["exec_sessions"]
        if most is not None and (running := count()) >= most:
            raise QuotaExceeded(_sentence("exec_sessions", most, running))

    def _check(self, tx: Tx, owner: str, resources: tuple[str, ...], being_made: str | None = None) -> None:
        limits = self._limits_in(tx, owner)
        vms, vcpus, mem_mib, checkpoints = tx.execute(_USED, owner).fetchone()
        if being_made is not None:
            checkpoints += tx.execute(_BEING_MADE, owner, being_made).fetchone()[0]
        used = {"vms": vms, "vcpus": vcpus, "mem_mib": mem_mib, "checkpoints": checkpoints}
        for resource in resources:
            most = limits[resource]
            if most is not None and used[resource] > most:
                raise QuotaExceeded(_sentence(resource, most, used[resource]))

    def _limits_in(self, tx: Tx, owner: str) -> dict[str, int | None]:
        return self._merged(tx.execute(_OWN_LIMITS, owner).fetchall())

    def _merged(self, own: Iterable[tuple[str, int | None]]) -> dict[str, int | None]:
        return self._defaults | {name: most for name, most in own if name in RESOURCES}

    # --- bytes --------------------------------------------------------------------------------------------------------

    async def _measured(self, owner: str) -> int:
        """Measure, one user at a time and each once for all who wait: it reads whole directories."""
        while (measuring := self._measuring.get(owner)) is not None:
            await measuring.over.wait()
            if measuring.bytes is not None:
                return measuring.bytes
        measuring = self._measuring[owner] = _Measurement()
        try:
            measuring.bytes = await self._measure(owner)
        finally:
            del self._measuring[owner]
            measuring.over.set()
        return measuring.bytes

    async def _measure(self, owner: str) -> int:
        instances = [row[0] for row in self._store.rows("SELECT instance FROM vms WHERE owner = ?", owner)]
        own = [self._layout.users / owner, *map(self._layout.vm, instances)]
        everybody = [self._layout.golden, self._layout.images]
        with hostfs.os_errors("measuring what is on the disk"):
            return await trio.to_thread.run_sync(_occupied, own, everybody, limiter=self._one_measurement)


class _Measurement:
    """One user's that is going on. *bytes* stays None if it fails, or whoever began it has gone."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.bytes: int | None = None


def _occupied(own: list[Path], everybody: list[Path]) -> int:
    """Return what *own* occupies together, without what it shares with *everybody*: see `occupied_bytes`."""
    return hostextents.occupied_bytes(_files(own), _files(everybody))


def _files(directories: list[Path]) -> Iterator[Path]:
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path


def _sentence(resource: str, most: int, used: int) -> str:
    held = "this would be" if resource not in ("bytes", "exec_sessions") else "there are"
    relief = _RELIEF.get(resource, "Destroy a VM")
    return f"your quota of {_WORDS[resource]} is {most}, and {held} {used}. {relief} first, or ask for a higher quota."
