"""Networks without privileges: what a VM is connected to."""

from __future__ import annotations

from pathlib import Path

import noid_net_user
from noid_net_user import NetUserConfig

from noid.core.backends import AgentContext


async def test_every_instance_gets_the_same_lease_because_each_is_alone_on_its_network() -> None:
    network = noid_net_user.UserNetwork()
    leases = {await network.lease(f"instance-{number}") for number in range(100)}
    (lease,) = leases
    assert {lease.kind} == network.kinds
    assert (lease.guest_address, lease.gateway, lease.mac) == ("10.0.2.15/24", "10.0.2.2", None)


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
