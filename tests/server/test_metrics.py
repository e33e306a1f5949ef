"""/metrics: what is counted, for whom, and that labels stay bounded whatever clients send."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from noid.core.config.settings import LimitsConfig
from noid.core.layout import Layout
from noid.errors import BackendError
from noid.server.metrics import Metrics
from noid.testing.faults import fail

Server = Any  # see conftest.py
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in found}


async def metrics(server: Server) -> Samples:
    answer = await server.ask("GET", "/metrics")
    assert (answer.status, answer.headers["content-type"].partition(";")[0]) == (200, "text/plain")
    return samples(answer.body.decode())


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


async def test_requests_are_counted_by_route_and_status_and_not_by_what_was_typed(server: Server) -> None:
    await server.create("web")
    for path in ("/v1/vms/web", "/v1/vms/web", "/v1/vms/nope", "/no/such/path", "/another"):
        await server.ask("GET", path)
    await server.ask("FROB", "/v1/vms/web")
    found = await metrics(server)
    one = {"method": "GET", "route": "/v1/vms/<name>"}
    assert found[key("noid_requests_total", **one, status="200")] == 2
    assert found[key("noid_requests_total", **one, status="404")] == 1
    assert found[key("noid_request_seconds_count", **one)] == 3
    assert 0 < found[key("noid_request_seconds_sum", **one)] < 60
    assert found[key("noid_requests_total", method="", route="none", status="404")] == 3
    told = {value for _, labels in found for _, value in labels}
    assert not [value for value in told if re.search("web|FROB|nope|another|such", value)]


async def test_vms_are_counted_by_state_and_websockets_while_they_are_open(web: Server) -> None:
    await web.create("two")
    await web.ask("POST", "/v1/vms/two/stop", {"force": True})
    async with web.exec() as stream:
        await stream.ask("cat", stdin=True)
        await stream.feed(b"x")
        await stream.until(b"x")
        found = await metrics(web)
    assert (found[key("noid_vms", state="running")], found[key("noid_vms", state="stopped")]) == (1, 1)
    assert found[key("noid_vms", state="dead")] == 0
    assert found[key("noid_websocket_sessions")] == 1
    with trio.fail_after(5):
        while (await metrics(web))[key("noid_websocket_sessions")]:  # noqa: ASYNC110  # what is awaited is the figure
            await trio.sleep(0.01)


@pytest.mark.parametrize("server", [{"limits": LimitsConfig(max_connections=1)}], indirect=True)
async def test_connections_are_counted_and_those_that_were_one_too_many(server: Server) -> None:
    first = await server.tcp()
    assert (await first.ask("GET", "/healthz")).status == 200
    assert (await (await server.tcp()).ask("GET", "/healthz")).status == 503
    found = await metrics(server)
    assert found[key("noid_connections")] == 1
    assert found[key("noid_connections_refused_total")] == 1


async def test_who_is_not_let_in_is_counted_by_why(server: Server) -> None:
    for number in range(2):
        await server.refused("GET", "/v1/vms", token=f"noid_tok_{number:064}")
    user = await server.agent.users.add("alice")
    reader, _ = await server.agent.users.create_token(user[0], "reader", frozenset({"read"}))
    await server.refused("DELETE", "/v1/vms/web", token=reader)
    found = await metrics(server)
    assert found[key("noid_auth_failures_total", code="unauthenticated")] == 2
    assert found[key("noid_auth_failures_total", code="scope")] == 1


async def test_metrics_are_for_the_local_user_and_whom_the_configuration_names(server: Server) -> None:
    alice, prometheus = await server.add_user("alice"), await server.add_user("prometheus")
    object.__setattr__(server.agent, "config", dataclasses.replace(server.config, metrics_users=("prometheus",)))
    assert (await server.refused("GET", "/metrics", token=alice))[:2] == (403, "scope")
    assert (await server.ask("GET", "/metrics", token=prometheus)).status == 200
    client = await server.tcp()
    assert (await client.ask("GET", "/metrics")).status == 401


async def test_the_loop_and_the_disk_are_measured_until_the_server_stops(data_dir: Path) -> None:
    layout, counted, stopping = Layout(data_dir), Metrics(), trio.Event()
    for directory in (layout.images, layout.users / "someone", layout.vm("one")):
        directory.mkdir(parents=True)
    (layout.images / "rootfs").write_bytes(b"x" * 65536)
    (layout.vm("one") / "rootfs").hardlink_to(layout.images / "rootfs")
    (layout.users / "someone" / "memory").write_bytes(b"x" * 8192)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(counted.keep_measuring, layout, stopping)
        with trio.fail_after(10):
            while not samples(counted.show().decode())[key("noid_loop_lag_seconds_count")]:  # noqa: ASYNC110  # the same
                await trio.sleep(0.05)
        stopping.set()
    found = samples(counted.show().decode())
    stored = {
        kind: found[key("noid_stored_bytes", kind=kind)] for kind in ("images", "templates", "checkpoints", "vms")
    }
    assert stored == {"images": 65536, "templates": 0, "checkpoints": 8192, "vms": 0}


async def test_operations_are_counted_with_how_they_ended_and_what_their_phases_took(web: Server) -> None:
    await web.ask("POST", "/v1/vms/web/checkpoints")
    web.faults.arm("capture", fail(BackendError("the disk is on fire")))
    await web.refused("POST", "/v1/vms/web/checkpoints")
    found = await metrics(web)
    assert found[key("noid_operations_total", kind="vm.create", outcome="succeeded")] == 1
    for outcome in ("succeeded", "failed"):
        assert found[key("noid_operations_total", kind="vm.checkpoint", outcome=outcome)] == 1
        assert found[key("noid_operation_seconds_count", kind="vm.checkpoint", outcome=outcome)] == 1
    pause = {"kind": "vm.checkpoint", "phase": "pause"}
    assert found[key("noid_operation_phase_seconds_count", **pause)] == 1
    assert 0 < found[key("noid_operation_phase_seconds_sum", **pause)] < 10


async def test_every_metric_is_on_its_page_with_its_labels(web: Server, request: pytest.FixtureRequest) -> None:
    await web.refused("GET", "/v1/vms", token="noid_tok_" + "0" * 64)
    page = (request.config.rootpath / "docs/operations.md").read_text()
    rows = re.findall(r"^\| (`noid_[^|]*) \| ([^|]*)\|", page, re.MULTILINE)
    with trio.fail_after(10):  # the disk is measured beside
        while not re.search(  # noqa: ASYNC110  # the same
            "^noid_stored_bytes", (await web.ask("GET", "/metrics")).body.decode(), re.MULTILINE
        ):
            await trio.sleep(0.05)
    documented = {
        name: set(re.findall(r"`(\w+)`", labels)) for names, labels in rows for name in re.findall(r"`(\w+)`", names)
    }
    text = (await web.ask("GET", "/metrics")).body.decode()
    real = {name for name, _ in re.findall(r"^# TYPE (noid_\w+?) (\w+)$", text, re.MULTILINE)}
    real = {name for name in real if not name.endswith("_created")}
    assert documented.keys() == real
    for name, labels in samples(text):
        family = re.sub("_(bucket|count|sum)$", "", name)
        if family in documented:
            assert {label for label, _ in labels} - {"le"} == documented[family], name
