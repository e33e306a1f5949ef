"""A whole noid for one run: an agent with its own data directory on a chosen filesystem, serving in this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.core.agent import Agent
from noid.core.config.settings import Backends, Config
from noid.core.images import Images
from noid.core.layout import Layout
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest, Gap
from noid.core.model.users import User
from noid.core.model.vms import Vm, VmSpec
from noid.core.opening import open_agent
from noid.core.plugins import Plugins
from noid.errors import BackendError, Conflict, NotFound

MEM_MIB = 256
BTRFS_MIB = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """An open agent and its one user."""

    agent: Agent
    user: User
    layout: Layout
    image: str

    async def create(self, name: str) -> Vm:
        """Make a VM of the benchmark's shape."""
        outcome = await self.agent.create_vm(self.user, VmSpec(name=name, mem_mib=MEM_MIB, image=self.image))
        return present(outcome.vm)

    async def fork(self, name: str, checkpoint: str, new_name: str) -> Vm:
        """Restore a checkpoint as a new VM."""
        return present((await self.agent.restore_vm(self.user, name, checkpoint, new_name)).vm)

    async def run(self, name: str, *argv: str) -> str:
        """Run a command in a VM and return what it printed.

        Raises:
            BackendError: it failed.
        """
        output = b""
        async with self.agent.guests.reach(self.user, name) as guest:
            process = await guest.start(ExecRequest(argv=argv))
            try:
                while not isinstance(received := await process.receive(), ProcessExit):
                    output += b"" if isinstance(received, Gap) else received.data
            finally:
                with trio.move_on_after(10, shield=True):
                    await guest.release(process)
        if received.status != 0:
            raise BackendError(f"{argv} in {name} ended with {received.status}: {output.decode(errors='replace')}")
        return output.decode(errors="replace")

    def directory(self, vm: Vm) -> Path:
        """Return the VM's directory."""
        return self.layout.vm(vm.instance)


def present(vm: Vm | None) -> Vm:
    """Return the VM an operation made; one that made none is a bug."""
    if vm is None:
        raise BackendError("the operation ended without a VM")
    return vm


@contextlib.asynccontextmanager
async def open_rig(data_dir: Path, storage: str, image: str, images: Path) -> AsyncIterator[Rig]:
    """Open an agent on *data_dir* with the image linked in from *images*; destroy its VMs at the end."""
    layout = Layout(data_dir)
    link_image(images / image, layout.images / image)
    async with driven(
        Config(data_dir=data_dir, local=True, backends=Backends(storage=storage)), Plugins(), image
    ) as rig:
        yield rig


@contextlib.asynccontextmanager
async def driven(config: Config, plugins: Plugins, image: str) -> AsyncIterator[Rig]:
    """Open the agent of *config*, whose data directory has the image; destroy its VMs at the end."""
    async with open_agent(config, plugins) as agent:
        rig = Rig(agent=agent, user=agent.local_user(), layout=Layout(config.data_dir), image=image)
        try:
            yield rig
        finally:
            with trio.move_on_after(60, shield=True):
                for vm in agent.vms(rig.user):
                    with contextlib.suppress(NotFound, Conflict):  # being undone: a measurement failed
                        await agent.destroy_vm(rig.user, vm.name)


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """Make a directory below *parent* and remove it at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def btrfs_directory(parent: Path) -> Iterator[Path | None]:
    """Yield a directory on btrfs: a new sparse loop mount. None where that takes rights or programs we have not."""
    if os.geteuid() != 0 or shutil.which("mkfs.btrfs") is None:
        yield None
        return
    with scratch_directory(parent) as directory:
        backing, mount = directory / "image", directory / "mount"
        mount.mkdir()
        with backing.open("wb") as file:
            file.truncate(BTRFS_MIB << 20)
        _quietly("mkfs.btrfs", "-q", str(backing))
        try:
            _quietly("mount", "-o", "loop", str(backing), str(mount))
        except subprocess.CalledProcessError:
            yield None
            return
        try:
            yield mount
        finally:
            _quietly("umount", "-l", str(mount))


def image_to_use(images: Path, wanted: str | None) -> str:
    """Return the image to measure: *wanted*, else ``default``, else the tiny one, which is made if there is none."""
    if wanted is not None:
        return wanted
    if (images / "default").is_dir():
        return "default"
    from noid.testing.guests import TINY, tiny_image

    tiny_image(Images(images, Plugins().initrd_files(os.uname().machine)))
    return TINY


def link_image(source: Path, target: Path) -> None:
    """Put an image into another data directory, by hard links where they can be. One that is there stays."""
    if target.exists():
        return
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            try:
                (target / file.name).hardlink_to(file)
            except OSError:  # another filesystem
                _quietly("cp", "--sparse=always", str(file), str(target / file.name))


def _quietly(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)
