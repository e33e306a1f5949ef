"""The executable specification of a VMM: subclass `VmmConformance`, give it a ``rig`` fixture, and run pytest.

::

    class TestMyVmm(VmmConformance):
        @pytest.fixture
        async def rig(self, data_dir: Path, shared: Path) -> AsyncIterator[VmmRig]:
            rig = VmmRig(vmm=MyVmm(), exec_backend=..., storage=..., image=..., data_dir=data_dir, shared=shared)
            yield rig
            await rig.close()

Collected (``pytest --collect-only``) it is the list of what `VmmBackend`, `Machine`, `Capture` and `Guest` promise.
"""

from __future__ import annotations

from noid.testing.vmm_checkpoints import CheckpointSpecification
from noid.testing.vmm_consoles import ConsoleSpecification
from noid.testing.vmm_guests import GuestSpecification
from noid.testing.vmm_lives import LifeSpecification
from noid.testing.vmm_starts import LaunchSpecification


class VmmConformance(
    LaunchSpecification, GuestSpecification, ConsoleSpecification, LifeSpecification, CheckpointSpecification
):
    """All of it."""
