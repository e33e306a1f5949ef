"""Firecracker's plugin keeps every promise a VMM makes: here on the simulated Firecracker, whose guest is made up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import noid_storage_copy
import pytest

from noid.core.backends import AgentContext
from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.simulated_exec import SimulatedExec
from noid.testing.simulated_image import simulated_image
from noid.testing.vmm_conformance import VmmConformance
from noid.testing.vmm_rig import Argv, VmmRig

vmm_firecracker = pytest.importorskip("noid_vmm_firecracker")


def counter(path: str, ignore_term: bool) -> Argv:
    return ("sh", "-c", f"trap '' TERM; count {path}") if ignore_term else ("count", path)


@pytest.fixture(scope="module")
def shared(data_dir_root: Path) -> Path:
    (directory := data_dir_root / "conformance-firecracker").mkdir()
    (directory / "run").mkdir()
    SimulatedFirecracker(directory / "program")
    return directory


@pytest.mark.usefixtures("no_leaks")
class TestSimulatedFirecracker(VmmConformance):
    @pytest.fixture
    async def rig(self, data_dir: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VmmRig]:
        monkeypatch.setattr("noid_vmm_firecracker.backend.ADOPT_SECS", 2.0)  # one test waits for all of it
        for name in ("run", "image"):
            (data_dir / name).mkdir()
        # The run directory of the probe is shared, so that KVM is tried once.
        context = AgentContext(data_dir=data_dir, run_dir=shared / "run", database=data_dir / "noid.db")
        spec, storage = vmm_firecracker.vmm_backend(), noid_storage_copy.storage_backend()
        config = spec.config(binary=str(shared / "program" / "firecracker"))
        async with spec.open(config, context) as backend, storage.open(storage.config(), context) as disks:
            rig = VmmRig(
                vmm=backend,
                exec_backend=SimulatedExec(),
                storage=disks,
                image=simulated_image(data_dir / "image"),
                data_dir=data_dir,
                shared=shared,
                counter=counter,
            )
            yield rig
            await rig.close()
