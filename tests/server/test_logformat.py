"""The server's log: one line for one thing, the request's id on all of its lines, and nobody's secret."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from noid.core import tracing
from noid.core.config.settings import LoggingConfig
from noid.server import logformat
from noid.server.logformat import JsonFormatter, TextFormatter

Server = Any  # see conftest.py
Log = Any
TOKEN = "noid_tok_" + "5e" * 32
FORGED = "\n2026-01-01T00:00:00.000Z INFO noid: all is well\r\x1b[2J\u2028"


def record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("noid.test", logging.INFO, "here.py", 1, message, args, None)
    made.__dict__.update(fields)
    return made


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_what_a_client_says_cannot_look_like_another_line(formatter: logging.Formatter) -> None:
    text = formatter.format(record("GET %s", f"/{FORGED}"))
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text


def test_a_traceback_cannot_look_like_another_line_either() -> None:
    try:
        raise RuntimeError(FORGED)
    except RuntimeError:
        bug = record("a bug")
        bug.exc_info = sys.exc_info()
    first, *rest = TextFormatter().format(bug).splitlines()
    assert first.endswith(" INFO noid.test: a bug")
    assert rest
    assert all(line.startswith("  ") for line in rest)
    assert "\x1b" not in "".join(rest)


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_token_that_slips_into_a_message_stays_inside(formatter: logging.Formatter) -> None:
    text = formatter.format(record("bad header: Bearer %s", TOKEN, header=TOKEN))
    assert "5e5e" not in text
    assert "noid_tok_[hidden]" in text


def test_json_has_what_the_record_has() -> None:
    with tracing.working_for("r1"):
        fields = json.loads(JsonFormatter().format(record("made %s", "web", vm="web", ms=1.5)))
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "info", "logger": "noid.test", "message": "made web", "request": "r1", "vm": "web", "ms": 1.5,
    }  # fmt: skip


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = before
    root.setLevel(level)


@pytest.mark.usefixtures("root")
def test_level_and_format_can_be_changed_at_any_time(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("noid.test")
    logformat.set_up(LoggingConfig(level="warning"))
    logger.info("unheard")
    logformat.set_up(LoggingConfig(level="debug", format="json"))
    logger.debug("heard")
    logging.getLogger("somebody.elses").debug("unheard")
    logformat.set_up(LoggingConfig(level="error"))
    logger.error("plain")
    first, second = capsys.readouterr().err.splitlines()
    assert json.loads(first)["message"] == "heard"
    assert second.endswith(" ERROR noid.test: plain")


# --- whose doing a line is -------------------------------------------------------------------------------------------


async def test_a_task_works_for_the_request_that_started_it_until_that_has_ended(nursery: trio.Nursery) -> None:
    seen: list[str | None] = []
    go_on = trio.Event()

    async def watch() -> None:
        seen.append(tracing.request_id())
        await go_on.wait()
        seen.append(tracing.request_id())

    async def operation(*, task_status: trio.TaskStatus[None]) -> None:
        with tracing.carrying_on():
            task_status.started()
            await go_on.wait()
            seen.append(tracing.request_id())

    with tracing.working_for("r1"):
        await nursery.start(operation)
    assert tracing.request_id() is None
    go_on.set()
    await trio.testing.wait_all_tasks_blocked()
    assert seen == ["r1"]

    seen.clear()
    go_on = trio.Event()
    with tracing.working_for("r2"):
        nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
    go_on.set()
    await trio.testing.wait_all_tasks_blocked()
    assert seen == ["r2", None]


async def test_a_request_and_its_operation_have_one_id_in_reply_and_log(server: Server, log: Log) -> None:
    answer = await server.ask("POST", "/v1/vms", {"name": "web", "cpus": 1, "mem_mib": 128})
    last = await log.request(answer.headers["x-request-id"])
    lines = log.of(answer.headers["x-request-id"])
    assert "create web" in [line["message"] for line in lines]
    assert (last["method"], last["path"], last["status"], last["ended"]) == ("POST", "/v1/vms", 201, True)
    assert last["bytes"] == len(answer.body)


@pytest.mark.parametrize("path", ["/healthz", "/nowhere", "/v1/vms/no-such-vm", "/v1/vms/no-such-vm/console"])
async def test_every_request_has_one_line(server: Server, log: Log, path: str) -> None:
    answer = await server.ask("GET", path)
    line = await log.request(answer.headers["x-request-id"])
    assert log.of(answer.headers["x-request-id"]) == [line]
    assert (line["path"], line["status"], line["remote"]) == (path, answer.status, "local")


async def test_what_is_no_request_has_a_line_too(server: Server, log: Log) -> None:
    client = await server.tcp()
    await client.stream.send_all(b"\x16\x03\x01 hello\r\n\r\n")
    assert (await client.until_closed()).startswith(b"HTTP/1.1 400")
    [line] = [line for line in log.lines if "is no request" in line["message"]]
    assert line["message"] == "what came from 127.0.0.1 was answered 400: it is no request"


async def test_a_websocket_has_one_line_when_it_has_ended(web: Server, log: Log) -> None:
    async with web.exec() as exec_:
        await exec_.ask("true")
        await exec_.result()
        headers = {name.lower(): value for name, value in exec_.ws.handshake_headers}
    line = await log.request(headers[b"x-request-id"].decode())
    assert (line["method"], line["status"], line["close_code"], line["ended"]) == ("WS", 101, 1000, True)


async def test_a_websocket_that_its_client_closes_has_ended_in_order(web: Server, log: Log) -> None:
    async with web.exec() as exec_:
        await exec_.ask("sleep", "60")
        headers = {name.lower(): value for name, value in exec_.ws.handshake_headers}
        await exec_.ws.aclose(1000)
    line = await log.request(headers[b"x-request-id"].decode())
    assert (line["close_code"], line["ended"]) == (1000, True)
    assert "-> 101, closed by the client with 1000 (" in line["message"]


async def test_an_operation_that_fails_has_a_line_with_the_names_of_one_that_succeeds(web: Server, log: Log) -> None:
    answer = await web.ask("POST", "/v1/vms", {"name": "web", "cpus": 1, "mem_mib": 128})
    await log.request(answer.headers["x-request-id"])
    (line, _) = log.of(answer.headers["x-request-id"])
    assert line["message"] == "create of web failed: VM 'web' already exists"
    assert (line["op"], line["vm"]) == ("vm.create", "web")


async def test_a_client_that_leaves_has_a_line_and_its_operation_goes_on_under_the_id(server: Server, log: Log) -> None:
    go_on = trio.Event()
    server.faults.arm("launch", lambda _: go_on.wait())
    client = await server.unix()
    fields = {"name": "web", "cpus": 1, "mem_mib": 128}
    await client.send("POST", "/v1/vms", fields, headers={"x-request-id": "left-1"})
    await server.faults.reached("launch")
    await client.stream.aclose()
    assert (await log.request("left-1"))["status"] is None
    go_on.set()
    with trio.fail_after(10):
        while log.of("left-1")[-1]["message"] != "create web":  # noqa: ASYNC110
            await trio.sleep(0.01)


@pytest.mark.parametrize(
    ("given", "taken"),
    [("abc-1.2_3", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ('"; drop', False), ("", False)],
)
async def test_an_id_that_is_fit_for_a_log_is_taken_over(server: Server, given: str, taken: bool) -> None:
    answer = await server.ask("GET", "/healthz", headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) is taken


async def test_what_users_send_and_see_is_not_logged(web: Server, log: Log) -> None:
    log.secrets |= {"env-secret", "input-secret", "output-secret", "file-secret", "query-secret"}
    answer = await web.run("env", env=["IT=env-secret"])
    assert "IT=env-secret" in answer["stdout"]
    await web.run("sh", "-c", "echo output-secret")
    async with web.exec() as exec_:
        await exec_.ask("cat", stdin=True)
        await exec_.feed(b"input-secret")
        await exec_.feed(b"")
        await exec_.result()
    await web.ask("PUT", "/v1/vms/web/files?path=/x&token=query-secret", "file-secret")
    token = await web.add_user("alice")
    await web.ask("GET", "/v1/vms", token=token)
    answer = await web.ask("GET", "/v1/vms", token=token[:-1])
    await log.request(answer.headers["x-request-id"])


async def test_a_line_is_short_however_long_the_path_is(server: Server, log: Log) -> None:
    answer = await server.ask("GET", "/v1/vms/" + "x" * 20_000)
    line = await log.request(answer.headers["x-request-id"])
    assert line["path"] == "/v1/vms/" + "x" * 492 + "..."
    assert len(json.dumps(line)) < 2000
