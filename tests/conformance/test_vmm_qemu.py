"""QEMU with the guest agent of ``exec_vsock`` keeps every promise a VMM makes, on real guests."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from noid.core.backends import AgentContext
from noid.core.images import Images
from noid.core.model.images import Image
from noid.core.model.sandbox import SandboxMode, SandboxSettings
from noid.errors import ConfigError, DependencyDown
from noid.testing.vmm_conformance import VmmConformance
from noid.testing.vmm_rig import VmmRig

vmm_qemu = pytest.importorskip("noid_vmm_qemu")
exec_vsock = pytest.importorskip("noid_exec_vsock")
STORAGE = os.environ.get("NOID_TEST_STORAGE", "copy")
"""Whose disks the machines have: of those that need nothing, `copy` takes the least time."""


@pytest.fixture(scope="module")
def image(data_dir_root: Path) -> Image:
    guests = pytest.importorskip("noid.testing.guests")
    try:
        payload = exec_vsock.initrd_files("x86_64")
        image: Image = guests.tiny_image(Images(data_dir_root / "conformance-images", payload))
    except (ConfigError, DependencyDown) as error:
        pytest.skip(f"no guest to boot: {error}")
    return image


@pytest.fixture(scope="module")
def shared(data_dir_root: Path) -> Path:
    (directory := data_dir_root / "conformance-qemu").mkdir()
    return directory


@pytest.mark.vm
@pytest.mark.usefixtures("no_leaks")
class TestQemu(VmmConformance):
    @pytest.fixture
    async def rig(self, data_dir: Path, shared: Path, image: Image) -> AsyncIterator[VmmRig]:
        (data_dir / "run").mkdir()
        context = AgentContext(
            data_dir=data_dir,
            run_dir=data_dir / "run",
            database=data_dir / "noid.db",
            sandbox=SandboxSettings(mode=SandboxMode.AUTO),  # as root all of it
        )
        vmm, exec_ = vmm_qemu.vmm_backend(), exec_vsock.exec_backend()
        storage = importlib.import_module(f"noid_storage_{STORAGE}").storage_backend()
        if vmm is None:
            pytest.skip("the QEMU plugin does not offer itself on this host")
        async with contextlib.AsyncExitStack() as opened:
            try:
                backend = await opened.enter_async_context(vmm.open(vmm.config(), context))
            except DependencyDown as error:
                pytest.skip(str(error))
            guests = await opened.enter_async_context(exec_.open(exec_.config(), context))
            disks = await opened.enter_async_context(storage.open(storage.config(), context))
            rig = VmmRig(vmm=backend, exec_backend=guests, storage=disks, image=image, data_dir=data_dir, shared=shared)
            yield rig
            await rig.close()
