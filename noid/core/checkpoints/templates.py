"""Golden templates: the first create of a shape boots once, every later one restores what that boot came to.

A template is keyed by the fingerprint of all it depends on, so a stale one is never found, only collected. It is built
in scratch directories that the next start wipes, and published by a rename: no journal is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import trio

from noid import hostfs
from noid.core.backends import LaunchPlan, Machine, StorageBackend
from noid.core.checkpoints import freezing
from noid.core.checkpoints import manifest as manifests
from noid.core.checkpoints.manifest import Manifest
from noid.core.guests.identity import new_identity
from noid.core.ids import new_id, new_instance
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.images import Image
from noid.core.model.processes import ExecRequest
from noid.core.model.storage import FrozenDisk
from noid.core.model.times import now
from noid.core.model.vms import NetLease, VmSpec
from noid.core.services import Services
from noid.core.waiting import console_tail, until_it_ends
from noid.errors import Damaged, DeadlineExceeded, Incompatible, NoidError, NotFound, Unsupported

logger = logging.getLogger(__name__)

FORMAT = 4
"""To be raised when guests are to be booted in another way than before."""
GUEST_NAME = "noid"
CLEANUP_SECS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something a machine can be restored from: a template's or a checkpoint's verified directory."""

    directory: Path
    manifest: Manifest

    @property
    def disk(self) -> FrozenDisk:
        """The frozen disk."""
        return self.manifest.disk(self.directory)


class Templates:
    """Finds, builds and collects templates. One build at a time for each fingerprint; others wait for it."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._building: dict[str, trio.Lock] = {}

    async def get(self, spec: VmSpec) -> Source:
        """Return the template of *spec*'s shape, booting it first when there is none.

        Raises:
            NotFound: no such image.
            DependencyDown: the guest never answered; the console's last lines are in the message.
            DeadlineExceeded: it did not finish booting.
        """
        services = self._services
        image = await trio.to_thread.run_sync(services.images.get, spec.image)
        directory = services.layout.golden / self.fingerprint(spec, image)
        async with self._building.setdefault(directory.name, trio.Lock()):
            try:
                return await verified(services, directory)
            except NotFound:
                logger.info("no template yet for %s with %d vCPU, %d MiB", image.name, spec.cpus, spec.mem_mib)
            except (Damaged, Incompatible) as error:
                logger.warning("template %s is not used: %s", directory.name, error)
            await self._build(spec, image, directory)
            return await verified(services, directory)

    async def fingerprint_of(self, spec: VmSpec) -> str:
        """Return what the template of *spec*'s shape is called, whether or not there is one.

        Raises:
            NotFound: no such image.
        """
        return self.fingerprint(spec, await trio.to_thread.run_sync(self._services.images.get, spec.image))

    def fingerprint(self, spec: VmSpec, image: Image) -> str:
        """Return what a template of that shape is called: 24 hex digits of a digest of all it depends on."""
        services = self._services
        facts = {
            "format": FORMAT,
            "image": image.digest,
            "cpus": spec.cpus,
            "mem_mib": spec.mem_mib,
            "vmm": dict(services.vmm.fingerprint()),
            "disk": services.storage.features.format,
            "network": services.config.backends.network,
            "boot_args": self.boot_args(spec),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]

    async def collect(self) -> None:
        """Remove templates that nothing will ask for again: their image, the VMM or the settings are others now.

        While an image cannot be read, the templates made from it stay. What cannot be removed is logged.
        """
        try:
            for directory in await trio.to_thread.run_sync(self._stale):
                logger.info("removing template %s: its image, VMM or settings are others now", directory.name)
                await trio.to_thread.run_sync(hostfs.remove_tree, directory)
        except (NoidError, OSError):
            logger.exception("templates that are not needed any more could not all be removed")

    def _stale(self) -> list[Path]:
        services = self._services
        images = services.images.list()
        unreadable = set(services.images.names()) - {image.name for image in images}
        found = []
        for directory in _directories(services.layout.golden):
            try:
                template = manifests.read(directory)
            except (NotFound, Damaged):
                found.append(directory)
                continue
            wanted = {
                self.fingerprint(
                    VmSpec(name=template.vm_name, cpus=template.cpus, mem_mib=template.mem_mib, image=image.name), image
                )
                for image in images
                if image.digest == template.image_digest
            }
            if template.image not in unreadable and directory.name not in wanted:
                found.append(directory)
        return found

    def boot_args(self, spec: VmSpec) -> list[str]:
        """Return what plugins add to the kernel command line of a VM of that shape."""
        offered = self._services.plugins.hook.boot_args(spec=spec, lease=None)
        return [argument for arguments in offered for argument in arguments]

    async def _build(self, spec: VmSpec, image: Image, directory: Path) -> None:
        """Boot, wait until the guest is ready, freeze, publish; the booted machine is discarded."""
        services = self._services
        instance = new_instance()
        scratch, run_dir = services.layout.scratch / instance, services.layout.run(instance)
        partial = directory.with_name(f"{directory.name}.partial")
        machine: Machine | None = None
        check_disk_of(image, services.storage)
        logger.info("booting a template: image %s, %d vCPU, %d MiB", image.name, spec.cpus, spec.mem_mib)
        try:
            with hostfs.os_errors("make a template"):
                for path in (partial, directory):
                    await trio.to_thread.run_sync(hostfs.remove_tree, path)
                for path in (scratch, run_dir, partial / "disk"):
                    path.mkdir(parents=True, mode=0o700)
            root = FrozenDisk(
                directory=image.rootfs.parent, format="raw", top=image.rootfs.name, files=(image.rootfs.name,)
            )
            volume = await services.storage.clone(root, scratch)
            lease = await services.network.lease(instance)
            plan = LaunchPlan(
                instance=instance,
                directory=scratch,
                run_dir=run_dir,
                data_dir=services.config.data_dir,
                cpus=spec.cpus,
                mem_mib=spec.mem_mib,
                volume=volume,
                lease=lease,
                kernel=image.kernel,
                initrd=image.initrd,
                cmdline=" ".join([image.cmdline, *self.boot_args(spec)]).strip(),
            )
            machine = await services.vmm.launch(plan)
            reached_by = await self._boot(machine, image, scratch, lease)
            freeze_plan = await services.storage.prepare_freeze(volume, partial / "disk")
            frozen = await freezing.freeze(machine, services.storage, freeze_plan, partial, resume=False)
            draft = Manifest(
                id=directory.name,
                vm_id=instance,
                vm_name="golden",
                label=None,
                parent=None,
                created_at=now(),
                cpus=spec.cpus,
                mem_mib=spec.mem_mib,
                image=image.name,
                image_digest=image.digest,
                kernel_release=image.kernel_release,
                network=lease.kind if lease else "none",
                fingerprint=services.vmm.fingerprint(),
                exec=reached_by,
            )
            await freezing.complete(frozen, partial, draft, {})
            with hostfs.os_errors("publishing a template"):
                await trio.to_thread.run_sync(hostfs.publish_directory, partial, directory)
        finally:
            with trio.move_on_after(CLEANUP_SECS, shield=True):
                try:
                    if machine is not None:
                        await machine.kill()
                        await machine.aclose()
                    await services.network.release(instance)
                    for path in (scratch, run_dir, partial):
                        await trio.to_thread.run_sync(hostfs.remove_tree, path)
                except (NoidError, OSError):  # the build has succeeded or failed for a reason of its own
                    logger.exception("what template %s was made of is not gone; the next start sweeps", directory.name)

    async def _boot(self, machine: Machine, image: Image, directory: Path, lease: NetLease | None) -> str:
        """Wait until the guest answers and its ready command has ended, and wake it once. Return what reached it.

        The wake is for its clones: what this one does (network, mounts, files), theirs find done and only adjust.
        """
        services = self._services
        secs = services.config.boot_timeout_secs
        link = services.supervisor.link(machine, directory, has_agent=image.agent)
        try:
            with trio.fail_after(secs):
                async with until_it_ends(machine, directory), link.guest() as guest:
                    process = await guest.start(ExecRequest(argv=image.ready))
                    while not isinstance(await process.receive(), ProcessExit):
                        pass
                    await guest.release(process)
                    await guest.wake(new_identity(GUEST_NAME, new_id(), lease))
                    return link.reached_by
        except trio.TooSlowError as error:
            raise DeadlineExceeded(
                f"image {image.name!r} did not finish booting within {secs:g} s.{console_tail(directory)} Try again "
                "on a less busy host, raise boot_timeout_secs in server.toml, or check the image."
            ) from error
        finally:
            link.drop()


def check_disk_of(image: Image, storage: StorageBackend) -> None:
    """Let *image* boot only if its guest can use the disks that *storage* makes.

    Raises:
        Unsupported: it has no agent that would put them together.
    """
    if storage.features.needs_agent and not image.agent:
        raise Unsupported(
            f"storage {storage.name}",
            f"give image {image.name!r} a disk, because that was imported with --no-agent, and noid's own first "
            "program puts these disks together",
            remedy='Import the image without --no-agent, or set [backends] storage = "copy" in server.toml.',
        )


async def verified(services: Services, directory: Path) -> Source:
    """Return *directory* as a source, having checked its manifest against this host and its files.

    Raises:
        NotFound, Damaged, Incompatible: see `noid.core.checkpoints.manifest.verify`.
    """

    def check() -> Source:
        manifest = manifests.read(directory)
        formats = frozenset({services.storage.features.format})
        manifests.verify(directory, manifest, services.vmm.fingerprint(), formats)
        return Source(directory=directory, manifest=manifest)

    return await trio.to_thread.run_sync(check)


def _directories(parent: Path) -> list[Path]:
    """Return the directories in *parent*, which may not exist yet."""
    return sorted(entry for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
