"""A simulated Firecracker for each test here, and a rig to run its machines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import noid_storage_copy
import pytest
from noid_vmm_firecracker.backend import FirecrackerBackend
from noid_vmm_firecracker.probe import Found

from noid.core.backends import AgentContext
from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.simulated_exec import SimulatedExec
from noid.testing.simulated_image import simulated_image
from noid.testing.vmm_rig import VmmRig


@pytest.fixture
def firecracker(data_dir: Path) -> SimulatedFirecracker:
    return SimulatedFirecracker(data_dir / "program")


@pytest.fixture
async def rig(data_dir: Path, firecracker: SimulatedFirecracker, no_leaks: None) -> AsyncIterator[VmmRig]:
    del no_leaks
    for name in ("run", "image", "shared"):
        (data_dir / name).mkdir()
    context = AgentContext(data_dir=data_dir, run_dir=data_dir / "run", database=data_dir / "noid.db")
    storage = noid_storage_copy.storage_backend()
    async with storage.open(storage.config(), context) as disks:
        rig = VmmRig(
            vmm=FirecrackerBackend(Found(path=str(firecracker.program), version=(1, 17, 0), kvm_refusal="")),
            exec_backend=SimulatedExec(),
            storage=disks,
            image=simulated_image(data_dir / "image"),
            data_dir=data_dir,
            shared=data_dir / "shared",
            counter=lambda path, ignore_term: ("count", path),
        )
        yield rig
        await rig.close()
