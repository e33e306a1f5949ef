"""A client of the predecessor (0.2.20 to 0.2.31), as strict and as lax as it was, finds what it needs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from wsproto.frame_protocol import FrameProtocol, Opcode

from noid.server import interim
from noid.testing.raw_http import RawClient

Server = Any  # see conftest.py

READ_SECS = 30.0
"""How long a socket may be silent before it gave up a REST call."""

VM = {"name": str, "state": str, "cpus": int, "mem_mib": int, "created_at": str}
CHECKPOINT = {"id": str, "vm_name": str, "label": str | None, "created_at": str}

KEY, ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


class GaveUp(Exception):
    """It ended with ``Error:`` and these words."""


class Impatient:
    """A socket whose reader gives up on silence."""

    def __init__(self, stream: trio.SocketStream, patience_secs: float) -> None:
        self._stream = stream
        self._patience_secs = patience_secs

    async def send_all(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def receive_some(self, size: int) -> bytes:
        with trio.move_on_after(self._patience_secs):
            return bytes(await self._stream.receive_some(size))
        raise GaveUp(f"connection error: nothing came for {self._patience_secs:g} s")


def checked(fields: Any, kinds: dict[str, Any]) -> dict[str, Any]:
    """Return *fields* as it parsed them: all of these must be there, with these types; others it ignored."""
    assert isinstance(fields, dict)
    for name, kind in kinds.items():
        assert name in fields, f"missing field `{name}`"
        assert isinstance(fields[name], kind), name
        assert not isinstance(fields[name], bool), name
    return {name: fields[name] for name in kinds}


class OldClient:
    """What its commands did, and how they read the answers. exec: WebSocket first, POST where that is refused."""

    def __init__(self, server: Server, token: str) -> None:
        self._server = server
        self._token = token
        self.stdout = b""
        self.stderr = b""

    async def exec(self, name: str, *argv: str) -> int:
        """Run a command and return the exit code it would have ended with."""
        host, _, port = self._server.config.listen.rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            frames = await self._upgrade(stream, f"/v1/vms/{name}/exec")
            if frames is None:
                return await self._fall_back(name, argv)
            await stream.send_all(frames.send_data(json.dumps({"command": argv, "tty": False, "env": []})))
            return await self._read(stream, frames)

    async def _upgrade(self, stream: trio.SocketStream, path: str) -> FrameProtocol | None:
        """Return the frames, or None where the answer is not 101. Anything unexpected in a 101 was an error."""
        lines = [f"GET {path} HTTP/1.1", "Host: noid", "Connection: Upgrade", "Upgrade: websocket"]
        lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {KEY}", f"authorization: Bearer {self._token}"]
        await stream.send_all("\r\n".join([*lines, "", ""]).encode())
        heard = b""
        while b"\r\n\r\n" not in heard:
            heard += await stream.receive_some(65536)
        head, _, rest = heard.partition(b"\r\n\r\n")
        status, *fields = head.decode().split("\r\n")
        if status.split(" ")[1] != "101":
            return None
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in fields)]
        found = dict(headers)
        assert len(found) == len(headers), "no header twice"
        assert (found["connection"].lower(), found["upgrade"].lower()) == ("upgrade", "websocket")
        assert found["sec-websocket-accept"] == ACCEPT
        assert not {"sec-websocket-protocol", "sec-websocket-extensions"} & found.keys()
        frames = FrameProtocol(client=True, extensions=[])
        frames.receive_bytes(rest)
        return frames

    async def _read(self, stream: trio.SocketStream, frames: FrameProtocol) -> int:
        code = 0  # what it said when nobody told it otherwise
        while True:
            for frame in frames.received_frames():
                if frame.opcode is Opcode.CLOSE:
                    return code
                if frame.opcode is Opcode.BINARY:
                    self._output(bytes(frame.payload))
                elif frame.opcode is Opcode.TEXT:
                    code = self._text(json.loads(frame.payload), code)
            data = await stream.receive_some(65536)
            assert data, "a connection that ends without a close frame"
            frames.receive_bytes(bytes(data))

    def _output(self, message: bytes) -> None:
        if message[:1] == b"\x01":
            self.stdout += message[1:]
        elif message[:1] == b"\x02":
            self.stderr += message[1:]

    def _text(self, fields: dict[str, Any], code: int) -> int:
        """It tried ExecResult, then ErrorResponse, and ignored everything else."""
        if {"timed_out", "truncated"} <= fields.keys():
            return 124 if fields["timed_out"] else fields["exit_code"] if fields["exit_code"] is not None else code
        if isinstance(fields.get("error"), str):
            self.stderr += f"error: {fields['error']}\n".encode()
            return 1
        return code

    async def _fall_back(self, name: str, argv: tuple[str, ...]) -> int:
        client: RawClient = await self._server.tcp()
        answer = await client.ask(
            "POST", f"/v1/vms/{name}/exec", {"command": argv, "tty": False}, {"authorization": f"Bearer {self._token}"}
        )
        if answer.status != 200:
            self.stderr += f"server error ({answer.status}): {answer.json()['error']}\n".encode()
            return 1
        assert answer.headers["x-noid-api-version"] == "1"
        fields = answer.json()
        self.stdout += fields["stdout"].encode()
        return 124 if fields["timed_out"] else int(fields["exit_code"] or 0)

    # --- REST --------------------------------------------------------------------------------------------------------

    async def rest(self, method: str, path: str, body: Any = None, *, patience_secs: float = READ_SECS) -> Any:
        """Make a call as its HTTP library did and return the JSON of the answer, None of an empty one.

        Raises:
            GaveUp: what it would have printed after ``Error:``.
        """
        host, _, port = self._server.config.listen.rpartition(":")
        headers = {"authorization": f"Bearer {self._token}", "user-agent": "noid/0.2.31", "accept-encoding": "gzip"}
        if body is not None:
            headers["content-type"] = "application/json"
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            client = RawClient(Impatient(stream, patience_secs))  # type: ignore[arg-type]  # what of it is used
            answer = await client.ask(method, path, body, headers)
        assert "content-encoding" not in answer.headers
        if not 200 <= answer.status < 300:
            raise GaveUp(f"server error ({answer.status}): {answer.json()['error']}")
        version = answer.headers.get("x-noid-api-version")
        if version is not None and (not version.isdigit() or int(version) != 1):
            raise GaveUp(f"the server speaks version {version}")
        return json.loads(answer.body) if answer.body else None

    async def create(self, name: str, **kind: Any) -> str:
        """Return what ``noid create`` printed."""
        vm = checked(await self.rest("POST", "/v1/vms", {"name": name, "cpus": 1, "mem_mib": 2048}, **kind), VM)
        return f"VM '{vm['name']}' created (state: {vm['state']})"

    async def checkpoint(self, name: str, label: str | None) -> str:
        """Return what ``noid checkpoint`` printed."""
        fields = await self.rest("POST", f"/v1/vms/{name}/checkpoints", {"label": label})
        made = checked(fields, CHECKPOINT)
        return f"Checkpoint '{made['id']}' created" + (f" (label: {made['label']})" if made["label"] else "")

    # --- console -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def console(self, name: str, *env: str) -> AsyncIterator[OldConsole]:
        """Attach to a console; entering ends when *env* was typed and heard again, or 3 s later."""
        host, _, port = self._server.config.listen.rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            frames = await self._upgrade(stream, f"/v1/vms/{name}/console")
            if frames is None:
                raise GaveUp("HTTP error")
            console = OldConsole(stream, frames)
            if env:
                await console.set_env(env)
            yield console


class OldConsole:
    """Its end of a console."""

    def __init__(self, stream: trio.SocketStream, frames: FrameProtocol) -> None:
        self._stream = stream
        self._frames = frames
        self._pending: list[bytes] = []
        self.shown = b""
        self.warned = False

    async def set_env(self, env: tuple[str, ...]) -> None:
        """Type assignments and a line that marks their end, and discard everything until the mark is heard."""
        for name, _, value in (entry.partition("=") for entry in env):
            quoted = value.replace("'", "'\\''")
            await self._type(f" export {name}='{quoted}'\r".encode())
        mark = b"__NOID_ENV_SYNC_%x__" % time.time_ns()
        await self._type(b" echo " + mark + b"\r")
        heard = b""
        with trio.move_on_after(3.0) as waiting:
            while mark not in heard:
                heard += await self._next()
        self.warned = waiting.cancelled_caught

    async def until(self, expected: bytes) -> None:
        """Show what comes until it ends with *expected*."""
        with trio.fail_after(READ_SECS):
            while not self.shown.endswith(expected):
                self.shown += await self._next()

    async def press(self, text: str) -> None:
        """Press keys, one frame for each; Enter is CR."""
        for key in text:
            await self._type(key.encode())

    async def press_and_leave(self, text: str) -> None:
        """Press keys, all at once, and hang up."""
        await self._stream.send_all(b"".join(self._frames.send_data(b"\x03" + key.encode()) for key in text))
        await self._stream.aclose()

    async def paste(self, text: str) -> None:
        """Paste: one frame, each end of a line as CR."""
        await self._type(text.replace("\n", "\r").encode())

    async def exit(self) -> None:
        """Type ``exit`` and Enter: the word goes to the guest, 0x15 takes it back, and an empty close frame follows."""
        await self.press("exit")
        await self._type(b"\x15")
        await self._stream.send_all(self._frames.close())

    async def _type(self, data: bytes) -> None:
        await self._stream.send_all(self._frames.send_data(b"\x03" + data))

    async def _next(self) -> bytes:
        """Return the next stdout bytes. One message at a time, and never two within 10 ms."""
        await trio.sleep(0.01)
        while not self._pending:
            for frame in self._frames.received_frames():
                assert frame.opcode is Opcode.BINARY, f"heard {frame.opcode!r} {frame.payload!r}"
                message = bytes(frame.payload)
                assert message[:1] == b"\x01"
                self._pending.append(message[1:])
            if not self._pending:
                data = await self._stream.receive_some(65536)
                assert data, "the connection has ended"
                self._frames.receive_bytes(bytes(data))
        return self._pending.pop(0)


@pytest.fixture
async def old(server: Server) -> OldClient:
    token = await server.add_user("alice")
    await server.create(token=token)
    return OldClient(server, token)


async def test_it_gets_output_and_exit_code_over_a_websocket(old: OldClient) -> None:
    assert await old.exec("web", "sh", "-c", "echo out; echo err >&2; exit 3") == 3
    assert (old.stdout, old.stderr) == (b"out\n", b"err\n")


async def test_an_error_before_the_upgrade_reaches_it_by_its_second_try(old: OldClient) -> None:
    assert await old.exec("nope", "true") == 1
    assert old.stderr == b"server error (404): VM 'nope' not found\n"


@pytest.mark.parametrize("server", [{"max_ws_sessions": 1, "exec_timeout_secs": 0.5}], indirect=True)
async def test_where_websockets_are_used_up_it_gets_its_answer_by_post(old: OldClient, server: Server) -> None:
    async with server.exec(token=old._token):
        assert await old.exec("web", "sh", "-c", "echo out; exit 3") == 3
        assert await old.exec("web", "sleep", "60") == 124
    assert old.stdout == b"out\n"


async def test_its_rest_calls_find_every_field_they_need(old: OldClient) -> None:
    assert await old.create("db") == "VM 'db' created (state: running)"
    vms = [checked(vm, VM) for vm in await old.rest("GET", "/v1/vms")]
    assert [vm["name"] for vm in vms] == ["web", "db"]
    assert all(re.fullmatch(r"\d{4}(-\d\d){2} \d\d(:\d\d){2}", vm["created_at"]) for vm in vms)
    assert checked(await old.rest("GET", "/v1/vms/web"), VM) == vms[0]
    printed = await old.checkpoint("web", "before-deploy")
    checkpoint = re.findall("[0-9a-f]{16}", printed)[0]  # as its provisioning script did
    assert printed == f"Checkpoint '{checkpoint}' created (label: before-deploy)"
    await old.checkpoint("web", None)
    listed = [checked(fields, CHECKPOINT) for fields in await old.rest("GET", "/v1/vms/web/checkpoints")]
    assert [(one["vm_name"], one["label"]) for one in listed] == [("web", "before-deploy"), ("web", None)]
    restore = {"checkpoint_id": checkpoint, "new_name": None}
    assert checked(await old.rest("POST", "/v1/vms/web/restore", restore), VM)["name"] == "web"
    restore["new_name"] = "copy"
    assert checked(await old.rest("POST", "/v1/vms/web/restore", restore), VM)["name"] == "copy"
    for name in ("web", "db", "copy"):
        assert await old.rest("DELETE", f"/v1/vms/{name}") is None
    assert await old.rest("GET", "/v1/vms") == []
    checked(await old.rest("GET", "/v1/whoami"), {"user_id": str, "name": str})


@pytest.mark.parametrize(
    ("method", "path", "body", "printed"),
    [
        ("GET", "/v1/vms/nope", None, "server error (404): VM 'nope' not found"),
        ("DELETE", "/v1/vms/nope", None, "server error (404): VM 'nope' not found"),
        ("POST", "/v1/vms", {"name": "web"}, "server error (409): VM 'web' already exists"),
        (
            "POST",
            "/v1/vms/web/restore",
            {"checkpoint_id": "0123456789abcdef"},
            "server error (404): checkpoint '0123456789abcdef' not found",
        ),
    ],
)
async def test_it_prints_the_text_of_an_error(old: OldClient, method: str, path: str, body: Any, printed: str) -> None:
    with pytest.raises(GaveUp) as refused:
        await old.rest(method, path, body)
    assert str(refused.value) == printed


async def test_no_call_is_silent_for_so_long_that_it_gives_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert interim.STILL_WORKING_SECS * 2 < READ_SECS
    monkeypatch.setattr(interim, "STILL_WORKING_SECS", 0.1)

    async def slow(_: int | None) -> None:
        await trio.sleep(2.0)

    server.faults.arm("launch", slow)
    old = OldClient(server, await server.add_user("alice"))
    assert await old.create("web", patience_secs=1.5) == "VM 'web' created (state: running)"


async def test_its_console_shows_512_bytes_of_history_and_what_it_types(old: OldClient, server: Server) -> None:
    async with old.console("web") as console:
        await console.paste(f"echo {'x' * 600}\n")
        await console.until(b"x\r\n# ")
        await console.exit()
    async with old.console("web") as console:
        await console.until(b"# " + b"exit" + b"\b \b" * 4)
        assert 512 <= len(console.shown) <= 512 + 16, "the last of it may have been printed after the attach"
        await console.press("hostname\r")
        await console.until(b"# ")
        assert console.shown.endswith(b"hostname\r\nweb\r\n# "), "the word that was taken back was never run"
        await console.exit()


async def test_all_that_was_typed_before_leaving_reaches_the_guest(old: OldClient) -> None:
    words = "word " * 40
    async with old.console("web") as console:
        await console.press_and_leave(f"echo {words}end\r")
    async with old.console("web") as console:
        await console.until(f"\n{words}end\r\n# ".encode())


async def test_its_env_line_comes_back_at_once_whatever_the_values(old: OldClient) -> None:
    began = trio.current_time()
    async with old.console("web", "A=1", "B=it's", "EMPTY=") as console:
        assert not console.warned
        assert trio.current_time() - began < 3.0
        await console.press("echo on\r")
        await console.until(b"echo on\r\non\r\n# ")


async def test_its_console_of_what_is_not_there_ends_before_the_upgrade(old: OldClient) -> None:
    with pytest.raises(GaveUp):
        async with old.console("nope"):
            pass
