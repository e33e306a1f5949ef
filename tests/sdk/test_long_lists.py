"""Lists longer than a page: they come whole from a real server, and those that never end are none."""

from __future__ import annotations

from typing import Any

import pytest

import noid
from noid.client.calls import call, operations


async def test_a_list_of_many_pages_is_whole_and_in_order(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"vm{number}" for number in range(7)]
    for name in names:
        await client.create(name, mem_mib=128, labels={"odd": str(int(name[-1]) % 2)})
    vm = await client.vm("vm0")
    ids = [(await vm.checkpoint()).id for _ in range(5)]
    processes = [(await vm.start_process(["true"])).id for _ in range(3)]
    whole = await client.perform(operations.every())
    monkeypatch.setattr(call, "PAGE_ITEMS", 2)
    assert [vm.name for vm in await client.vms()] == names
    assert [vm.name for vm in await client.vms(labels=["odd=1"])] == names[1::2]
    assert [checkpoint.id for checkpoint in await client.checkpoints()][-5:] == ids
    assert [checkpoint.id for checkpoint in await vm.checkpoints()][-5:] == ids
    assert [process.id for process in await vm.processes()] == processes
    in_pages = await client.perform(operations.every())
    assert [each["id"] for each in in_pages] == [each["id"] for each in whole]
    assert len(in_pages) >= 12
    assert len(await client.perform(operations.every(limit=3))) == 3


async def test_pages_that_never_end_are_no_list(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("web", "db", "cache"):
        await client.create(name, mem_mib=128)
    monkeypatch.setattr(call, "PAGE_ITEMS", 1)
    monkeypatch.setattr("noid.client.link.PAGES_MAX", 2)
    with pytest.raises(noid.ConnectionFailed, match="noid-server would not"):
        await client.vms()
    monkeypatch.setattr("noid.client.link.PAGES_MAX", 10)
    assert len(await client.vms()) == 3


@pytest.mark.parametrize(
    ("link", "there"),
    [
        ("", None),
        ('</v1/vms?limit=2>; rel="prev"', None),
        ('</v1/vms?limit=2&cursor=x>; rel="next"', "/v1/vms?limit=2&cursor=x"),
        ('<https://proxy.example/noid/v1/vms?cursor=x>; rel="next"', "/v1/vms?cursor=x"),
    ],
)
def test_the_next_page_is_one_of_the_same_list(link: str, there: str | None) -> None:
    assert call.next_page("/v1/vms?limit=2", call.Reply(status=200, headers={"link": link}, body=b"[]")) == there


@pytest.mark.parametrize("target", ["/v1/vms", "/v1/vms?a b", "/v1/vms?\u00e4", "/v1/vms?a\tb", ""])
def test_a_next_page_that_is_no_place_is_none(target: str) -> None:
    with pytest.raises(call.NotNoid):
        call.next_page("/v1/vms", call.Reply(status=200, headers={"link": f'<{target}>; rel="next"'}, body=b"[]"))
