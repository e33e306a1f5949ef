"""Disks as chains of qcow2 layers, so that a clone copies nothing on a filesystem that cannot share blocks.

Every directory is self-contained: it holds a hard link to each layer of its chain. So deleting a VM or a checkpoint is
plain ``unlink``, and the filesystem counts who still needs a layer. Only the top of a VM is ever written, and only a
VM's directory has it, except between `prepare_freeze` and `freeze`, when the checkpoint being made has it too.

    VM                 checkpoint           clone
    0 base  ---------- 0 base  ------------ 0 base         one inode
    1 frozen --------- 1 frozen ----------- 1 frozen       one inode
    2 top (written)                         2 its own top (written)

A chain grows by one layer with each freeze. A clone of a chain deeper than `CLONE_DEPTH_MAX` is flattened: everything
above the base is gathered in one layer, outside any pause. A VM that is frozen again and again without ever being
restored reaches `DEPTH_MAX`, and freezing it is refused with that advice. Opening a layer costs QEMU 0.4 ms and a
file descriptor.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from pathlib import Path

import trio

from noid.core.backends import FreezePlan, Machine, StorageFeatures
from noid.core.model.storage import DiskUsage, FrozenDisk, Volume
from noid.errors import BackendError, Conflict, DependencyDown, NoidError, NoSpace
from noid.hostfs import os_errors, write_out
from noid.rawdisk import link_or_copy
from noid_storage_overlay.layers import (
    Layer,
    base_name,
    checked_chain,
    layer_of,
    layers_in,
    new_name,
    virtual_bytes,
    write_empty_layer,
)

logger = logging.getLogger(__name__)

NAME = "overlay"
QEMU_IMG = "qemu-img"

CLONE_DEPTH_MAX = 32
DEPTH_MAX = 256

_COPIES_AT_ONCE = 4


class OverlayStorage:
    """Fulfils `noid.core.backends.StorageBackend` with qcow2 layers."""

    def __init__(self) -> None:
        self.name = NAME
        self.features = StorageFeatures(format="qcow2", freeze_is_constant=True, needs_pivot=True)
        self._copies = trio.CapacityLimiter(_COPIES_AT_ONCE)

    async def clone(self, source: FrozenDisk, into: Path) -> Volume:
        """Link *source*'s layers into *into* and put an empty top over them. A raw *source* becomes the base.

        Copies no data, unless the chain is deeper than `CLONE_DEPTH_MAX` (flattened), or a link is impossible
        (another filesystem, 65000 names): that one layer is copied.

        Raises:
            NoSpace: *into* may hold a part.
            Damaged: *source*'s chain is incomplete.
            DependencyDown: the chain must be flattened and ``qemu-img`` is missing.
        """
        if source.format == "raw":
            names = {source.top: base_name(source.path)}
        else:
            chain = checked_chain(filter(None, map(layer_of, source.files)), source.directory)
            names = {layer.name: layer.name for layer in chain}

        def link_and_top() -> None:
            for name, new in names.items():
                link_or_copy(source.directory / name, into / new)
            chain = checked_chain(layers_in(into), into)
            if len(chain) <= CLONE_DEPTH_MAX:
                _put_top(into, chain[-1])

        with os_errors(f"cloning the disk {source.path}"):
            await trio.to_thread.run_sync(link_and_top, limiter=self._copies)
            if len(names) > CLONE_DEPTH_MAX:
                async with self._copies:
                    await _flatten(into)
        return self.volume(into)

    def volume(self, directory: Path) -> Volume:
        """Return the volume that lies in *directory*; its top is the layer of the highest depth.

        Raises:
            Damaged: there is none, or its chain is incomplete.
        """
        with os_errors(f"looking at the disk in {directory}"):
            chain = checked_chain(layers_in(directory), directory)
        return Volume(directory=directory, format=chain[-1].format, top=chain[-1].name, files=_names(chain))

    async def prepare_freeze(self, volume: Volume, into: Path) -> FreezePlan:
        """Link the chain into *into* and make the empty layer the guest will write to. *into* is the caller's.

        Also writes out what the guest has written so far: the machine syncs its top when it leaves it, in the pause.

        The link to the present top is not immutable yet: it becomes so when `freeze` moves the machine off it. A plan
        whose freeze never happened leaves *into* to be removed by the caller, as after any error.

        Raises:
            Conflict: the chain is as deep as it may get.
            NoSpace: the volume is untouched; *into* may hold a part.
        """
        directory = volume.directory

        def prepare() -> FreezePlan:
            chain = checked_chain(layers_in(directory), directory)
            if len(chain) > DEPTH_MAX:
                raise Conflict(
                    f"the disk in {directory} has {len(chain)} layers, one for each checkpoint of this VM, and takes "
                    "no more. The VM goes on. Restore it in place from its newest checkpoint, which joins the layers."
                )
            for layer in chain[:-1]:
                link_or_copy(directory / layer.name, into / layer.name)
            (into / chain[-1].name).hardlink_to(directory / chain[-1].name)  # live: a copy would be of no instant
            write_out(directory / chain[-1].name)
            present = Volume(directory=directory, format=chain[-1].format, top=chain[-1].name, files=_names(chain))
            return FreezePlan(volume=present, into=into, prepared=_put_top(directory, chain[-1]))

        with os_errors(f"preparing to freeze the disk in {directory}"):
            return await trio.to_thread.run_sync(prepare)

    async def freeze(self, plan: FreezePlan, machine: Machine | None) -> FrozenDisk:
        """Move the machine to the prepared layer. That is all: the links are there. No *machine*: nothing to move.

        Raises:
            BackendError: the machine did not move and writes where it wrote.
        """
        if machine is not None:
            refusal = await _pivot(machine, plan)
            if refusal is not None:
                # Either the VMM failed, or an agent died between preparing and freezing, and left an empty layer the
                # machine has never heard of between its top and ours. Then the plan is made again without it.
                live = layer_of((await machine.disk_path()).name)
                if live is None or live.name not in plan.volume.files[:-1]:
                    raise refusal
                logger.warning("disk in %s: dropping layers above the live %s", plan.volume.directory, live.name)
                with os_errors(f"freezing the disk {plan.volume.path}"):
                    plan = await trio.to_thread.run_sync(_planned_again, plan, live)
                await machine.pivot_disk(_prepared(plan), "qcow2")
        volume = plan.volume
        return FrozenDisk(directory=plan.into, format=volume.format, top=volume.top, files=volume.files)

    async def abandon_freeze(self, plan: FreezePlan, machine: Machine | None) -> None:
        """Remove the prepared layer if the machine itself says that it writes to another one. Can be repeated.

        In every other case the layer stays: no machine to ask (it may be running all the same, when a crash is being
        cleaned up before machines are adopted), or none that answers. Staying is safe, because a layer nobody wrote
        to changes no content: the volume has exactly one top, the highest depth, and it reads the same.
        """
        if plan.prepared is None or machine is None:
            return
        try:
            live = await machine.disk_path()
        except NoidError as error:
            logger.info("disk in %s: keeping %s: %s", plan.volume.directory, plan.prepared.name, error)
            return
        if live.name == plan.prepared.name:
            return
        with os_errors(f"removing the unused layer {plan.prepared}"):
            await trio.to_thread.run_sync(_unlink, plan.prepared)

    async def usage(self, thing: Volume | FrozenDisk) -> DiskUsage:
        """Return what the layers occupy: unique is what has no name in another directory."""

        def measure() -> DiskUsage:
            unique_bytes = shared_bytes = 0
            for name in thing.files:
                facts = (thing.directory / name).stat()
                if facts.st_nlink > 1:
                    shared_bytes += facts.st_blocks * 512
                else:
                    unique_bytes += facts.st_blocks * 512
            return DiskUsage(unique_bytes=unique_bytes, shared_bytes=shared_bytes)

        with os_errors(f"measuring the disk {thing.path}"):
            return await trio.to_thread.run_sync(measure)

    async def delete(self, thing: Volume | FrozenDisk) -> None:
        """Unlink every layer in the directory, those made since *thing* was looked up included."""

        def remove() -> None:
            for name in {*thing.files, *_names(layers_in(thing.directory))}:
                _unlink(thing.directory / name)

        with os_errors(f"deleting the disk {thing.path}"):
            await trio.to_thread.run_sync(remove)


async def _pivot(machine: Machine, plan: FreezePlan) -> NoidError | None:
    """Move *machine* to the prepared layer; return why it did not."""
    try:
        await machine.pivot_disk(_prepared(plan), "qcow2")
    except NoidError as error:
        return error
    return None


def _put_top(directory: Path, below: Layer) -> Path:
    top = directory / new_name(below.depth + 1)
    write_empty_layer(top, below, virtual_bytes(directory / below.name))
    return top


def _names(layers: list[Layer]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _prepared(plan: FreezePlan) -> Path:
    if plan.prepared is None:
        raise BackendError(f"the freeze of {plan.volume.path} was not prepared by storage {NAME!r}.")
    return plan.prepared


def _planned_again(plan: FreezePlan, live: Layer) -> FreezePlan:
    """Return *plan* made anew over *live*, the layer the machine writes to. What lay above it was never written."""
    directory = plan.volume.directory
    for layer in layers_in(directory):
        if layer.depth > live.depth:
            _unlink(directory / layer.name)
            _unlink(plan.into / layer.name)
    chain = checked_chain(layers_in(directory), directory)
    volume = Volume(directory=directory, format=live.format, top=live.name, files=_names(chain))
    return FreezePlan(volume=volume, into=plan.into, prepared=_put_top(directory, live))


async def _flatten(directory: Path) -> None:
    """Gather all layers above the base in *directory* in one. Takes as long as copying what they hold.

    By ``rebase`` of an empty layer, which copies what differs from the base: ``convert -B base`` would lose every
    layer but the top.
    """
    chain = await trio.to_thread.run_sync(layers_in, directory)
    base, top = chain[0], chain[-1]
    flat = directory / new_name(1)
    await trio.to_thread.run_sync(write_empty_layer, flat, top, virtual_bytes(directory / top.name))
    await _run_qemu_img("rebase", "-f", "qcow2", "-F", base.format, "-b", base.name, str(flat))
    for layer in chain[1:]:
        await trio.to_thread.run_sync(_unlink, directory / layer.name)


async def _run_qemu_img(*arguments: str) -> None:
    program = shutil.which(QEMU_IMG)
    if program is None:
        raise DependencyDown(f"the program {QEMU_IMG} is missing. Install the package qemu-utils and try again.")
    done = await trio.run_process(
        [program, *arguments],
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    if done.returncode == 0:
        return
    words = done.stderr.decode(errors="replace").strip()
    if os.strerror(errno.ENOSPC) in words or os.strerror(errno.EDQUOT) in words:
        raise NoSpace(f"joining the layers of a disk failed: the disk is full ({words}); free space and try again.")
    raise BackendError(f"{QEMU_IMG} {arguments[0]} failed with status {done.returncode}: {words}")


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
