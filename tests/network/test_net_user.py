"""Networks without privileges: what a VM is connected to."""

from __future__ import annotations

from pathlib import Path

import noid_net_user
from noid_net_user import NetUserConfig

from noid.core.backends import AgentContext


async def test_an_instance_keeps_its_lease_and_no_two_share_a_hardware_address() -> None:
    network = noid_net_user.UserNetwork()
    leases = [await network.lease(f"instance-{number}") for number in range(1000)]
    assert [await network.lease(f"instance-{number}") for number in range(1000)] == leases
    assert len({lease.mac for lease in leases}) == 1000
    assert {lease.kind for lease in leases} == network.kinds
    assert {(lease.guest_address, lease.gateway) for lease in leases} == {("10.0.2.15/24", "10.0.2.2")}


def test_hardware_addresses_are_unicast_and_locally_administered() -> None:
    for number in range(100):
        first = int(noid_net_user.mac_of(f"instance-{number}").split(":")[0], 16)
        assert first & 0b11 == 0b10


async def test_without_a_network_there_is_no_lease_and_releasing_it_is_fine() -> None:
    network = noid_net_user.NoNetwork()
    assert await network.lease("instance") is None
    await network.release("instance")
    await network.release("instance")


async def test_both_offers_open(tmp_path: Path) -> None:
    context = AgentContext(data_dir=tmp_path, run_dir=tmp_path, database=tmp_path / "noid.db")
    opened = []
    for offer in noid_net_user.network_backend():
        async with offer.open(NetUserConfig(), context) as network:
            opened.append(network.name)
    assert opened == ["user", "none"]
