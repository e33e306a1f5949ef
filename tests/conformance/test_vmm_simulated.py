"""The simulated VMM passes the suite the real ones pass; only therefore may the core be tested on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from noid.core.backends import AgentContext
from noid.testing.simulated_exec import SimulatedExec
from noid.testing.simulated_image import simulated_image
from noid.testing.simulated_vmm import SimulatedVmm
from noid.testing.vmm_conformance import VmmConformance, full_disk
from noid.testing.vmm_rig import Argv, VmmRig

__all__ = ["full_disk"]


def counter(path: str, ignore_term: bool) -> Argv:
    return ("sh", "-c", f"trap '' TERM; count {path}") if ignore_term else ("count", path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulated")


@pytest.mark.usefixtures("no_leaks")
class TestSimulatedVmm(VmmConformance):
    """On raw disks, as with storage that copies."""

    @pytest.fixture
    async def rig(self, data_dir: Path, shared: Path) -> AsyncIterator[VmmRig]:
        copy = pytest.importorskip("noid_storage_copy")
        spec = copy.storage_backend()
        (data_dir / "run").mkdir()
        context = AgentContext(data_dir=data_dir, run_dir=data_dir / "run", database=data_dir / "noid.db")
        (images := data_dir / "image").mkdir()
        async with spec.open(spec.config(), context) as storage:
            rig = VmmRig(
                vmm=SimulatedVmm(),
                exec_backend=SimulatedExec(),
                storage=storage,
                image=simulated_image(images),
                data_dir=data_dir,
                shared=shared,
                counter=counter,
            )
            yield rig
            await rig.close()
