"""Where things lie under the data directory. Pure, apart from making directories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from noid.core import paths


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one agent. Everything that is hard-linked into each other lies on the one filesystem of *data_dir*.

    ::

        noid.db                                     the store
        images/<name>/                              kernels, initrds, root filesystems
        golden/<fingerprint>/                       templates
        storage/vms/<instance>/                     disk, memory, serial.log, vmm.log
        storage/users/<owner>/checkpoints/<id>/     manifest.json, state, memory, disk/
        storage/scratch/<instance>/                 machines that boot a template; wiped at start
        run/<instance>/                             sockets
    """

    data_dir: Path

    @property
    def private(self) -> tuple[Path, ...]:
        """What nobody else on this host may look into: memory and disks of guests, and what they print."""
        return self.golden, self.data_dir / "storage"

    @property
    def images(self) -> Path:
        """Registered images."""
        return self.data_dir / "images"

    @property
    def golden(self) -> Path:
        """Templates by fingerprint."""
        return self.data_dir / "golden"

    @property
    def scratch(self) -> Path:
        """Directories of machines that only exist to make a template."""
        return self.data_dir / "storage" / "scratch"

    @property
    def users(self) -> Path:
        """What belongs to somebody."""
        return self.data_dir / "storage" / "users"

    @property
    def vms(self) -> Path:
        """Directories of machines. Whose they are, the store knows: a waiting machine is nobody's yet."""
        return self.data_dir / "storage" / "vms"

    def vm(self, instance: str) -> Path:
        """A machine's lasting files."""
        return self.vms / instance

    def checkpoint(self, owner: str, checkpoint_id: str) -> Path:
        """A published checkpoint."""
        return self.users / owner / "checkpoints" / checkpoint_id

    def partial(self, owner: str, checkpoint_id: str) -> Path:
        """A checkpoint being made."""
        return self.users / owner / "checkpoints" / f"{checkpoint_id}.partial"

    def run(self, instance: str) -> Path:
        """A machine's sockets."""
        return paths.run_dir(self.data_dir) / instance
