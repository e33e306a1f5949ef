"""A real QEMU with a real guest for the tests here. The guest is captured once; each test continues that capture."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from noid_exec_vsock import VsockExec, guest_binary
from noid_storage_copy import storage_backend
from noid_vmm_qemu.backend import QemuConfig, open_backend

from noid.core.backends import AgentContext, BackendSpec, VmmBackend
from noid.core.images import Images
from noid.core.model.images import Image
from noid.errors import DependencyDown
from noid.testing.guests import tiny_image
from noid.testing.vmm_rig import VmmRig


@pytest.fixture(scope="session")
def qemu_image(data_dir_root: Path) -> Image:
    try:
        return tiny_image(Images(data_dir_root / "qemu-images", {"init": guest_binary("x86_64")}))
    except DependencyDown as error:
        pytest.skip(f"no guest to boot: {error}")


@pytest.fixture(scope="session")
def qemu_shared(data_dir_root: Path) -> Path:
    (directory := data_dir_root / "qemu-shared").mkdir()
    return directory


@pytest.fixture
def context(data_dir: Path) -> AgentContext:
    (run_dir := data_dir / "run").mkdir()
    return AgentContext(data_dir=data_dir, run_dir=run_dir, database=data_dir / "noid.db")


@pytest.fixture
async def qemu(context: AgentContext) -> AsyncIterator[VmmBackend]:
    spec: BackendSpec[VmmBackend] = BackendSpec("qemu", QemuConfig, open_backend)
    try:
        async with spec.open(QemuConfig(), context) as backend:
            yield backend
    except DependencyDown as error:
        pytest.skip(str(error))


@pytest.fixture
async def rig(
    qemu: VmmBackend, context: AgentContext, qemu_image: Image, qemu_shared: Path, no_leaks: None
) -> AsyncIterator[VmmRig]:
    del no_leaks
    storage = storage_backend()
    async with storage.open(storage.config(), context) as disks:
        rig = VmmRig(
            vmm=qemu,
            exec_backend=VsockExec(),
            storage=disks,
            image=qemu_image,
            data_dir=context.data_dir,
            shared=qemu_shared,
        )
        yield rig
        await rig.close()
