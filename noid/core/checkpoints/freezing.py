"""Freezing a machine into a directory: the pause, and what happens after it. Checkpoints and templates share this."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from noid import hostfs
from noid.core.backends import Capture, FreezePlan, Machine, StorageBackend
from noid.core.checkpoints import manifest as manifests
from noid.core.checkpoints.manifest import Manifest
from noid.core.model.storage import FrozenDisk
from noid.errors import DependencyDown, NoidError

RESUME_SECS = 10.0


@dataclass(slots=True)
class Pause:
    """How long the guest stood still."""

    secs: float = 0.0


@contextlib.asynccontextmanager
async def paused(machine: Machine, *, resume: bool = True) -> AsyncIterator[Pause]:
    """Pause *machine* for the block. It runs again afterwards, whatever failed and whoever was cancelled.

    Resuming has its own shield and deadline. With *resume* false the machine stays paused: it was before, or is
    about to be ended.

    Raises:
        DependencyDown: the machine did not resume; it has ended or hangs.
    """
    pause = Pause()
    started = time.perf_counter()
    why: NoidError | None = None
    try:
        await machine.pause()
        yield pause
    except NoidError as error:
        why = error
        raise
    finally:
        if resume:
            await _resume(machine, why)  # noqa: ASYNC102  # shields itself
            pause.secs = time.perf_counter() - started


async def _resume(machine: Machine, why: NoidError | None) -> None:
    """Let it run again; where that fails too, say so together with *why* the pause has failed."""
    try:
        with trio.move_on_after(RESUME_SECS, shield=True) as scope:
            await machine.resume()
        if scope.cancelled_caught:
            raise DependencyDown("the VM does not resume after its pause: its VMM does not answer any more.")
    except NoidError as error:
        if why is None:
            raise
        raise DependencyDown(f"{why} And the VM does not go on after its pause: {error}") from why


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """A machine's instant: device state and disk are on disk, changed memory is still held by *capture*."""

    capture: Capture
    disk: FrozenDisk
    pause_secs: float


async def freeze(machine: Machine, storage: StorageBackend, plan: FreezePlan, into: Path, *, resume: bool) -> Frozen:
    """Freeze memory, devices and disk at one instant. The guest runs again when this returns *or raises*.

    *plan* was prepared with ``into / "disk"``, which exists. With *resume* false the machine stays paused.
    """
    capture: Capture | None = None
    try:
        await machine.prepare_pause(plan.prepared)
        async with paused(machine, resume=resume) as pause:
            capture = await machine.capture(into)
            disk = await storage.freeze(plan, machine)
    except BaseException:
        if capture is not None:
            capture.discard()
        raise
    return Frozen(capture=capture, disk=disk, pause_secs=pause.secs)


async def complete(
    frozen: Frozen, into: Path, manifest: Manifest, known: Mapping[str, manifests.FileFacts]
) -> Manifest:
    """Build the memory image in *into* while the guest runs, and write the manifest. Not yet published.

    *manifest* comes without disk and files; *known* are facts of immutable layers that need not be read again.
    """
    try:
        await frozen.capture.finish()
    finally:
        frozen.capture.discard()

    def describe() -> Manifest:
        files = manifests.describe_files(into, frozen.disk, known)
        full = manifests.with_files(manifest, frozen.disk, files)
        manifests.write(into, full)
        return full

    with hostfs.os_errors("write the checkpoint's manifest"):
        return await trio.to_thread.run_sync(describe)
