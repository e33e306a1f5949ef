"""Firecracker's plugin keeps every promise a VMM makes: on the simulated one, whose guest is made up, and the real.

The real one is that of ``NOID_FIRECRACKER``, and runs where KVM works: ``scripts/rig`` makes such a place anywhere.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import noid_storage_layers
import pytest

from noid.core.backends import AgentContext
from noid.core.images import Images
from noid.core.model.images import Image
from noid.errors import ConfigError, DependencyDown
from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.guests import tiny_image
from noid.testing.simulated_exec import SimulatedExec
from noid.testing.simulated_image import simulated_image
from noid.testing.vmm_conformance import VmmConformance
from noid.testing.vmm_rig import Argv, VmmRig

vmm_firecracker = pytest.importorskip("noid_vmm_firecracker")
exec_vsock = pytest.importorskip("noid_exec_vsock")
STORAGE = os.environ.get("NOID_TEST_STORAGE", "copy")
"""Whose disks the real one's machines have. The simulated one's are in layers, as it gets them on ext4."""


def counter(path: str, ignore_term: bool) -> Argv:
    return ("sh", "-c", f"trap '' TERM; count {path}") if ignore_term else ("count", path)


@pytest.fixture(scope="class")
def shared(data_dir_root: Path, request: pytest.FixtureRequest) -> Path:
    (directory := data_dir_root / f"conformance-{request.cls.__name__}").mkdir()
    (directory / "run").mkdir()  # of the probe: KVM is tried once
    return directory


@pytest.fixture(scope="class")
def simulated(shared: Path) -> SimulatedFirecracker:
    return SimulatedFirecracker(shared / "program")


@pytest.mark.usefixtures("no_leaks")
class TestSimulatedFirecracker(VmmConformance):
    @pytest.fixture
    async def rig(
        self, data_dir: Path, shared: Path, simulated: SimulatedFirecracker, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[VmmRig]:
        monkeypatch.setattr("noid_vmm_firecracker.backend.ADOPT_SECS", 2.0)  # one test waits for all of it
        for name in ("run", "image"):
            (data_dir / name).mkdir()
        context = AgentContext(data_dir=data_dir, run_dir=shared / "run", database=data_dir / "noid.db")
        spec, storage = vmm_firecracker.vmm_backend(), noid_storage_layers.storage_backend()
        config = spec.config(binary=str(simulated.program))
        async with spec.open(config, context) as backend, storage.open(storage.config(), context) as disks:
            rig = VmmRig(
                vmm=backend,
                exec_backend=SimulatedExec(),
                storage=disks,
                image=simulated_image(data_dir / "image"),
                data_dir=data_dir,
                shared=shared,
                counter=counter,
                simulated=True,
            )
            yield rig
            await rig.close()


@pytest.fixture(scope="module")
def image(data_dir_root: Path) -> Image:
    try:
        return tiny_image(Images(data_dir_root / "firecracker-images", exec_vsock.initrd_files("x86_64")))
    except (ConfigError, DependencyDown) as error:
        pytest.skip(f"no guest to boot: {error}")


@pytest.mark.vm
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.skipif("NOID_FIRECRACKER" not in os.environ, reason="NOID_FIRECRACKER is not the path of a Firecracker")
class TestFirecracker(VmmConformance):
    @pytest.fixture
    async def rig(self, data_dir: Path, shared: Path, image: Image) -> AsyncIterator[VmmRig]:
        context = AgentContext(data_dir=data_dir, run_dir=shared / "run", database=data_dir / "noid.db")
        vmm, exec_ = vmm_firecracker.vmm_backend(), exec_vsock.exec_backend()
        storage = importlib.import_module(f"noid_storage_{STORAGE}").storage_backend()
        async with contextlib.AsyncExitStack() as opened:
            try:
                config = vmm.config(binary=os.environ["NOID_FIRECRACKER"])
                backend = await opened.enter_async_context(vmm.open(config, context))
            except DependencyDown as error:
                pytest.skip(str(error))
            guests = await opened.enter_async_context(exec_.open(exec_.config(), context))
            disks = await opened.enter_async_context(storage.open(storage.config(), context))
            rig = VmmRig(vmm=backend, exec_backend=guests, storage=disks, image=image, data_dir=data_dir, shared=shared)
            yield rig
            await rig.close()
