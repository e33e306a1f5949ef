"""The simulated VMM passes the suite the real ones pass; only therefore may the core be tested on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import noid_storage_copy
import noid_storage_overlay
import pytest

from noid.core.backends import AgentContext, BackendSpec, StorageBackend
from noid.errors import DependencyDown
from noid.testing.simulated_exec import SimulatedExec
from noid.testing.simulated_image import simulated_image
from noid.testing.simulated_vmm import SimulatedVmm
from noid.testing.vmm_conformance import VmmConformance
from noid.testing.vmm_rig import Argv, VmmRig


def counter(path: str, ignore_term: bool) -> Argv:
    return ("sh", "-c", f"trap '' TERM; count {path}") if ignore_term else ("count", path)


@pytest.fixture
def shared(request: pytest.FixtureRequest, data_dir_root: Path) -> Path:
    (directory := data_dir_root / request.cls.__name__).mkdir(exist_ok=True)
    return directory


@asynccontextmanager
async def simulated_rig(
    vmm: SimulatedVmm, spec: BackendSpec[StorageBackend], data_dir: Path, shared: Path
) -> AsyncIterator[VmmRig]:
    for name in ("run", "image"):
        (data_dir / name).mkdir()
    context = AgentContext(data_dir=data_dir, run_dir=data_dir / "run", database=data_dir / "noid.db")
    async with spec.open(spec.config(), context) as storage:
        rig = VmmRig(
            vmm=vmm,
            exec_backend=SimulatedExec(),
            storage=storage,
            image=simulated_image(data_dir / "image"),
            data_dir=data_dir,
            shared=shared,
            counter=counter,
            simulated=True,
            echo=("sleep", "1000"),  # it has that port without being asked
        )
        yield rig
        await rig.close()


@pytest.mark.usefixtures("no_leaks")
class TestSimulatedVmm(VmmConformance):
    """On raw disks, with storage that copies."""

    @pytest.fixture
    async def rig(self, data_dir: Path, shared: Path) -> AsyncIterator[VmmRig]:
        async with simulated_rig(SimulatedVmm(), noid_storage_copy.storage_backend(), data_dir, shared) as rig:
            yield rig


@pytest.mark.usefixtures("no_leaks")
class TestSimulatedVmmOnLayers(VmmConformance):
    """On qcow2 layers, which the live disk moves onto in each checkpoint."""

    @pytest.fixture
    async def rig(self, data_dir: Path, shared: Path) -> AsyncIterator[VmmRig]:
        try:
            spec = noid_storage_overlay.storage_backend()
            async with simulated_rig(SimulatedVmm(qcow2=True), spec, data_dir, shared) as rig:
                yield rig
        except DependencyDown as error:
            pytest.skip(str(error))
