"""Firecracker's API: typed calls over one kept-alive connection to its unix socket.

A call that is cancelled, or not answered in time, costs the connection: what would be answered next is not known to
belong to the next request. The one after makes a new connection.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import trio

from noid.errors import BackendError, DependencyDown, NoSpace
from noid.vmmhost.sockets import socket_itself

BODY_BYTES_MAX = 1 << 20
DEADLINE_SECS = 10.0
"""For every call but those below: each takes Firecracker milliseconds."""
SNAPSHOT_SECS = 120.0
"""For writing a snapshot, which takes as long as the disk does, and for loading one."""

_READ_BYTES = 65536
_NO_SPACE = re.compile(r"\(os error (?:28|122)\)")  # ENOSPC, EDQUOT
_WORDS_MAX = 2000
_NO_CONTENT = 204


_Request = tuple[h11.Connection, bytes]


class Refused(BackendError):
    """Firecracker understood a *call*, or at least heard it, and refused. *words* are its own."""

    def __init__(self, call: str, status: int, words: str) -> None:
        super().__init__(f"Firecracker refused {call} ({status}): {words}")
        self.call = call
        self.words = words


class Cut(DependencyDown):
    """The connection ended before an answer: the process has ended, or has dropped the connection and lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot that is to be written into two files; with *diff* only what changed since the last one, or a load.

    *memory* keeps its other bytes if it has the size of the machine's memory, and is made anew if not.
    """

    state: Path
    memory: Path
    diff: bool

    def wanted(self) -> dict[str, str]:
        """Return it as Firecracker is told."""
        kind = "Diff" if self.diff else "Full"
        return {"snapshot_type": kind, "snapshot_path": str(self.state), "mem_file_path": str(self.memory)}


class FirecrackerApi:
    """One Firecracker process' API at the unix socket *path*. Calls queue up, one at a time.

    Every call raises `Refused` when Firecracker refuses, `NoSpace` when it does so for want of room, and
    `DependencyDown` when it has ended or does not answer in time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = trio.Lock()
        self._socket: socket.socket | None = None
        self._ready: dict[str, _Request] = {}
        self._understood = b""  # an answer without content that h11 has read: the same bytes say the same
        self._closed = False

    # --- before the start ------------------------------------------------------------------------------------------

    async def machine_config(self, *, cpus: int, mem_mib: int, track_dirty_pages: bool) -> None:
        """Say how large the machine is."""
        shape = {"vcpu_count": cpus, "mem_size_mib": mem_mib, "smt": False, "track_dirty_pages": track_dirty_pages}
        await self.call("PUT", "/machine-config", shape)

    async def boot_source(self, *, kernel: Path, initrd: Path, arguments: str) -> None:
        """Say what boots."""
        source = {"kernel_image_path": str(kernel), "initrd_path": str(initrd), "boot_args": arguments}
        await self.call("PUT", "/boot-source", source)

    async def drive(self, name: str, path: str, *, is_root: bool = False, is_read_only: bool = False) -> None:
        """Add a disk, whose flushes reach the host's. The root is the guest's first, others come in their order."""
        drive = {"drive_id": name, "path_on_host": path, "is_root_device": is_root, "is_read_only": is_read_only}
        await self.call("PUT", f"/drives/{name}", drive | {"cache_type": "Writeback"})

    async def network_interface(self, name: str, tap: str, mac: str | None) -> None:
        """Add a network card that is connected to the TAP device *tap*."""
        card = {"iface_id": name, "host_dev_name": tap} | ({} if mac is None else {"guest_mac": mac})
        await self.call("PUT", f"/network-interfaces/{name}", card)

    async def vsock(self, path: str, *, guest_cid: int) -> None:
        """Add the socket device, reached at the unix socket *path*, which is made."""
        await self.call("PUT", "/vsock", {"guest_cid": guest_cid, "uds_path": path})

    async def entropy(self) -> None:
        """Add a source of randomness."""
        await self.call("PUT", "/entropy", {})

    async def start(self) -> None:
        """Let it boot."""
        await self.call("PUT", "/actions", {"action_type": "InstanceStart"})

    async def load_snapshot(
        self, *, state: Path, memory: Path, track_dirty_pages: bool, taps: Mapping[str, str], clock_realtime: bool
    ) -> None:
        """Continue a snapshot, running. *taps* are those of its network cards, by the cards' names.

        After a refusal Firecracker ends.
        """
        wanted: dict[str, Any] = {
            "snapshot_path": str(state),
            "mem_backend": {"backend_type": "File", "backend_path": str(memory)},
            "track_dirty_pages": track_dirty_pages,
            "resume_vm": True,
        }
        if taps:
            wanted["network_overrides"] = [{"iface_id": card, "host_dev_name": tap} for card, tap in taps.items()]
        if clock_realtime:
            wanted["clock_realtime"] = True
        await self.call("PUT", "/snapshot/load", wanted, deadline_secs=SNAPSHOT_SECS)

    # --- while it runs ---------------------------------------------------------------------------------------------

    def rehearse_pause(self, snapshot: Snapshot | None = None) -> None:
        """Make ready what is said in the next pause, with *snapshot* if that is known: a guest stands still then."""
        said: list[tuple[str, str, Mapping[str, Any]]] = [
            ("PATCH", "/vm", {"state": "Paused"}),
            ("PATCH", "/vm", {"state": "Resumed"}),
        ]
        if snapshot is not None:
            said.append(("PUT", "/snapshot/create", snapshot.wanted()))
        self._ready.clear()
        for method, path, content in said:
            body = json.dumps(content)
            self._ready[f"{method} {path} {body}"] = _request(method, path, body)

    async def pause(self) -> None:
        """Stop the vCPUs. Twice does nothing."""
        await self.call("PATCH", "/vm", {"state": "Paused"})

    async def resume(self) -> None:
        """Let the vCPUs run. Twice does nothing."""
        await self.call("PATCH", "/vm", {"state": "Resumed"})

    async def create_snapshot(self, snapshot: Snapshot) -> None:
        """Write device state and memory."""
        await self.call("PUT", "/snapshot/create", snapshot.wanted(), deadline_secs=SNAPSHOT_SECS)

    async def state(self, deadline_secs: float | None = None) -> str:
        """Return ``Not started``, ``Running`` or ``Paused``."""
        return await self._word("/", "state", deadline_secs)

    async def version(self) -> str:
        """Return the version as ``--version`` has it, with what follows the numbers."""
        return await self._word("/version", "firecracker_version")

    async def _word(self, path: str, name: str, deadline_secs: float | None = None) -> str:
        answer = await self.call("GET", path, deadline_secs=deadline_secs)
        if not isinstance(answer, dict) or not isinstance(answer.get(name), str):
            raise BackendError(f"what Firecracker answered to GET {path} has no {name}: {str(answer)[:200]!r}.")
        return str(answer[name])

    # --- the wire --------------------------------------------------------------------------------------------------

    async def call(
        self, method: str, path: str, content: Mapping[str, Any] | None = None, deadline_secs: float | None = None
    ) -> Any:  # JSON of any shape
        """Make one request and return what is answered, None when that is nothing."""
        secs = DEADLINE_SECS if deadline_secs is None else deadline_secs
        name = f"{method} {path}"
        try:
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            await self._turn.acquire()
        answer: tuple[int, bytes] | None = None
        try:
            try:
                with trio.move_on_after(secs):
                    answer = await self._exchange(method, path, content)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
                raise Cut(f"Firecracker ended, or hung up, at {name}.") from error
            except h11.RemoteProtocolError as error:
                raise BackendError(f"what answers to {name} is not Firecracker: {error}.") from error
            finally:
                if answer is None:
                    self._drop()
        finally:
            self._turn.release()
        if answer is None:
            raise DependencyDown(f"Firecracker did not answer {name} within {secs:g} s; it may be stuck.")
        status, body = answer
        if status >= 300:
            words = words_of(body)
            if _NO_SPACE.search(words):
                raise NoSpace(f"Firecracker has no room for {name}: {words}")
            raise Refused(name, status, words)
        try:
            return json.loads(body) if body else None
        except ValueError as error:
            raise BackendError(f"what Firecracker answered to {name} is no JSON: {body[:200]!r}.") from error

    async def connect(self) -> None:
        """Connect now instead of at the first call.

        Raises:
            OSError: nobody listens there (yet).
        """
        if self._closed:
            raise trio.ClosedResourceError("noid has let go of this VM")
        with socket_itself(self._path) as name:  # first: who waits for it asks often, and making a socket takes longer
            connecting = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
            try:
                await connecting.connect(name)
            except BaseException:
                connecting.close()
                raise
        # Of Python's own: trio's lets others go first after each message, while a guest may stand still.
        self._socket = socket.socket(fileno=connecting.detach())
        self._socket.setblocking(False)

    async def aclose(self) -> None:
        """Close the connection; Firecracker goes on."""
        self._closed = True
        self._drop()
        await trio.lowlevel.checkpoint()

    def _drop(self) -> None:
        if self._socket is not None:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        self._socket = None

    async def _exchange(self, method: str, path: str, content: Mapping[str, Any] | None) -> tuple[int, bytes]:
        if self._socket is not None and _has_hung_up(self._socket):
            self._drop()  # since the last answer: this request has not been sent yet, so nothing is lost
        if self._socket is None:
            await self.connect()
        sock = self._socket
        assert sock is not None  # noqa: S101  connected above
        body = "" if content is None else json.dumps(content)
        ready = f"{method} {path} {body}"
        http, data = self._ready.pop(ready) if ready in self._ready else _request(method, path, body)
        await _send(sock, data)
        status, answer = 0, bytearray()
        whole = received = await _receive(sock)
        if whole == self._understood:
            return _NO_CONTENT, b""  # nearly every answer is, and in a pause a guest waits until it is read
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                if not received:  # it comes in pieces
                    received, whole = await _receive(sock), b""
                http.receive_data(received)
                received = b""
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                answer += event.data
                if len(answer) > BODY_BYTES_MAX:
                    raise BackendError(f"Firecracker answered {method} {path} with over {BODY_BYTES_MAX} bytes.")
            elif isinstance(event, h11.EndOfMessage):
                break
        if http.our_state is not h11.DONE or http.their_state is not h11.DONE or http.trailing_data[0]:
            self._drop()  # it closes, or says what nobody has asked
        elif status == _NO_CONTENT:
            self._understood = whole
        return status, bytes(answer)


def _request(method: str, path: str, body: str) -> _Request:
    """Return the bytes of a request, and what reads its answer."""
    http = h11.Connection(h11.CLIENT)
    headers = [("Host", "localhost"), ("Accept", "application/json")]
    if body:
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body.encode())))]
    data = http.send(h11.Request(method=method, target=path, headers=headers)) or b""
    if body:
        data += http.send(h11.Data(data=body.encode())) or b""
    data += http.send(h11.EndOfMessage()) or b""
    return http, data


def _has_hung_up(sock: socket.socket) -> bool:
    """Whether the other end of a connection, on which nothing is outstanding, has ended it."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


async def _send(sock: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def _receive(sock: socket.socket) -> bytes:
    while True:
        with contextlib.suppress(BlockingIOError):
            if data := sock.recv(_READ_BYTES):
                return data
            raise trio.BrokenResourceError("the connection has ended")
        await trio.lowlevel.wait_readable(sock)


def words_of(body: bytes) -> str:
    """Return what an error's body says, on one line: some of them are no JSON, having a raw line break inside."""
    text = body.decode(errors="replace")
    try:
        content = json.loads(text, strict=False)
    except ValueError:
        content = None
    if isinstance(content, dict):
        text = str(content.get("fault_message") or content.get("error") or text)
    return " ".join(text.split())[:_WORDS_MAX] or "(without a word)"
