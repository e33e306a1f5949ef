"""A client of the predecessor (0.2.20 to 0.2.31), as strict and as lax as it was, finds what it needs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from wsproto.frame_protocol import FrameProtocol, Opcode

from noid.testing.raw_http import RawClient

Server = Any  # see conftest.py

KEY, ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


class OldClient:
    """What its ``noid exec`` did: WebSocket first, POST where that is refused, and how it read the answers."""

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
