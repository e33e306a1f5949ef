"""The microVM behind the simulated API: a simulated guest with memory in pages, so that a Diff holds what changed.

Memory is the guest's JSON in blocks of 4 KiB. A Diff has the blocks that differ from the last snapshot, at their
offsets, in a file with holes elsewhere: whoever loses one or merges it wrongly gets an image that does not load.
Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import selectors
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noid.testing.simulated_console import SimulatedConsole
from noid.testing.simulated_disk import SimulatedDisk
from noid.testing.simulated_driver import Line, SimulatedMachine

AGENT_PORT = 5005
_BLOCK_BYTES = 4096
_LENGTH = struct.Struct(">Q")
_TRIAL = re.compile(rb"noid-kvm-trial:([\x20-\x7e]+)\n")
_TICK_SECS = 0.05
_PR_SET_NAME = 15


class KernelInvalid(Exception):
    """The file is no kernel."""


class RestoreError(Exception):
    """A snapshot cannot be continued; the text is Firecracker's."""


class SimulatedMicroVm(SimulatedMachine):
    """A guest with Firecracker's devices. *track* says whether dirty pages are known."""

    one_host = False  # the guest's agent hangs up on the host before

    def __init__(
        self, facts: dict[str, Any], pages: dict[str, Any], listener: socket.socket | None, **rest: Any
    ) -> None:
        self.facts = facts
        self.cards: dict[str, dict[str, Any]] = facts["cards"]
        self.track = False
        self._seen = b""  # memory at the last snapshot; before the first, nothing but zeros
        self._halted = threading.Event()
        self._waiting: list[tuple[socket.socket, Callable[[socket.socket], None]]] = []
        self.is_paused = False
        super().__init__(
            disk=SimulatedDisk(facts["root"], locked=False, base=facts["base"]),
            memory=pages,
            exec_listener=listener or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            console=SimulatedConsole.on_standard_streams(rest["selector"]),
            **rest,
        )
        for number in range(facts["cpus"]):
            threading.Thread(target=self._tick, args=(number,), daemon=True).start()

    @classmethod
    def booted(
        cls,
        boot: dict[str, Any],
        shape: dict[str, Any],
        drives: dict[str, dict[str, Any]],
        vsock: dict[str, Any] | None,
        listener: socket.socket | None,
        selector: selectors.BaseSelector,
    ) -> SimulatedMicroVm:
        """Boot a guest.

        Raises:
            KernelInvalid: that is no kernel.
        """
        if not Path(boot["kernel_image_path"]).read_bytes()[:4] == b"\x7fELF":
            raise KernelInvalid(boot["kernel_image_path"])
        cmdline = boot.get("boot_args") or ""
        facts = _disks(cmdline, drives) | {
            "cpus": shape["vcpu_count"], "mem_mib": shape["mem_size_mib"], "cards": {},
            "drives": {name: drive["path_on_host"] for name, drive in drives.items()},
            "vsock": None if vsock is None else vsock["uds_path"],
        }  # fmt: skip
        machine = cls(facts, {}, listener, cmdline=cmdline, selector=selector)
        machine.track = shape["track_dirty_pages"]
        return machine

    def _tick(self, number: int) -> None:
        """Be a vCPU that idles: it runs a little, again and again, until the guest has halted."""
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"fc_vcpu {number}".encode(), 0, 0, 0)
        while not self._halted.wait(_TICK_SECS):
            pass
        threading.Event().wait()

    # --- the end ---------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Do what Linux does on Ctrl+Alt+Del."""
        self._end("reset")

    def _end(self, reason: str) -> None:
        if self.host is not None:
            self.host.flush()
        if reason == "reset":
            self.console.say(b"[    9.000000] reboot: Restarting system\r\n")
            os._exit(0)  # the threads that pass for vCPUs wait for nothing
        self.console.say(b"[    9.000000] reboot: Power off not available: System halted instead\r\n")
        self._halted.set()
        super().pause()

    def pause(self) -> None:
        """See the base."""
        self.is_paused = True
        super().pause()

    def resume(self) -> None:
        """See the base. What has halted stays halted."""
        self.is_paused = False
        if not self._halted.is_set():
            super().resume()

    # --- vsock -----------------------------------------------------------------------------------------------------

    def _accept_exec(self, listener: socket.socket) -> None:
        connection = listener.accept()[0]
        connection.setblocking(False)
        received = bytearray()

        def on_data(_: socket.socket) -> None:
            if self.paused:
                self.selector.unregister(connection)
                self._waiting.append((connection, on_data))
                return
            with contextlib.suppress(OSError):
                data = connection.recv(64)  # the line alone: nobody may send more before the answer
                received.extend(data)
                if data and b"\n" not in received:
                    return
            self.selector.unregister(connection)
            listens = not self.mute and self._uptime() >= self.answers_at
            if bytes(received) != f"CONNECT {AGENT_PORT}\n".encode() or not listens:
                connection.close()
                return
            self._detach()
            with contextlib.suppress(ConnectionError):  # then reading tells
                connection.send(b"OK 1073741824\n")
            self.host = Line(connection)
            self._update_exec()

        self.selector.register(connection, selectors.EVENT_READ, on_data)

    def _update_exec(self) -> None:
        super()._update_exec()
        if not self.paused:
            while self._waiting:
                connection, on_data = self._waiting.pop()
                self.selector.register(connection, selectors.EVENT_READ, on_data)

    def _reset_transport(self) -> None:
        """A snapshot cuts the guest's end of every connection; the host's stays silent until somebody writes to it.

        So does that of whoever asked for one meanwhile: that the question survives is promised nowhere.
        """
        for unheard, _ in self._waiting:
            unheard.recv(64)
            self.selector.register(unheard, selectors.EVENT_READ, lambda _, unheard=unheard: self._hang_up(unheard))
        self._waiting.clear()
        if self.host is None:
            return
        connection, self.host.socket = self.host.socket, self.host.socket.dup()
        if connection in self.selector.get_map():
            self.selector.unregister(connection)
        self._detach()
        self.selector.register(connection, selectors.EVENT_READ, lambda _: self._hang_up(connection))

    def _hang_up(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        connection.close()

    # --- snapshots -------------------------------------------------------------------------------------------------

    def save_state(self, path: Path) -> None:
        """Write the device state."""
        self._reset_transport()
        memory = encoded(self.guest.memory)
        state = {**self.facts, "cards": self.cards, "digest": hashlib.sha256(memory).hexdigest()}
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.write(fd, json.dumps(state).encode().ljust(12_000) + b"END")
            os.fsync(fd)
        finally:
            os.close(fd)

    def save_memory(self, path: Path, *, diff: bool) -> None:
        """Write all memory, or what changed since the last snapshot, into what is there already if it has the size."""
        now, size = encoded(self.guest.memory), self.facts["mem_mib"] << 20
        before = self._seen if diff and self.track else b""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            if os.fstat(fd).st_size != size or not diff:
                os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
            for offset in range(0, len(now), _BLOCK_BYTES):
                block = now[offset : offset + _BLOCK_BYTES]
                if block != before[offset : offset + _BLOCK_BYTES]:
                    os.pwrite(fd, block, offset)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._seen = now

    def knows(self, memory: bytes) -> None:
        """Begin to track changes from *memory*."""
        self._seen = memory


def _disks(cmdline: str, drives: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """Return what the guest's first program would mount: the root device, and the base where it is told of one."""
    ordered = sorted(drives.values(), key=lambda drive: not drive["is_root_device"])
    devices = {f"/dev/vd{letter}": drive for letter, drive in zip("abcdef", ordered, strict=False)}
    told = re.search(r"(?:^| )noid\.base=(\S+)", cmdline)
    base = None if told is None else devices[told[1]]
    if base is not None and not base["is_read_only"]:
        raise KernelInvalid("the base of the disk is not read-only")
    return {"root": ordered[0]["path_on_host"], "base": None if base is None else base["path_on_host"]}


def encoded(memory: dict[str, Any]) -> bytes:
    """Return the guest's memory as bytes, in whole blocks."""
    text = json.dumps(memory).encode()
    data = _LENGTH.pack(len(text)) + text
    return data + bytes(-len(data) % _BLOCK_BYTES)


def restored(
    content: dict[str, Any],
    memory_path: str,
    version: str,
    selector: selectors.BaseSelector,
    *,
    bind: Callable[[str], socket.socket],
    see_disk: Callable[[str], None],
    connect: Callable[[str], object],
) -> SimulatedMicroVm:
    """Continue a snapshot.

    Raises:
        RestoreError: it cannot be continued.
    """
    del version
    failed = "Failed to get snapshot state from file: "
    try:
        raw = Path(content["snapshot_path"]).read_bytes()
    except OSError as error:
        text = f"{error.strerror} (os error {error.errno})"
        raise RestoreError(f"{failed}Failed to open snapshot file: {text}") from error
    if len(raw) < 8:
        raise RestoreError(f"{failed}Failed to load snapshot state from file: IO Error: File too short to contain CRC")
    if not raw.endswith(b"END"):
        raise RestoreError(
            f"{failed}Failed to load snapshot state from file: An error occurred during bitcode serialization: "
            "bitcode error"
        )
    facts: dict[str, Any] = json.loads(raw[:-3])
    try:
        with Path(memory_path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(_LENGTH.unpack(file.read(8))[0])
            blocks = encoded(json.loads(data))
    except (OSError, ValueError, struct.error) as error:
        raise RestoreError(
            f"Failed to load guest memory: Error creating guest memory from file: Failed to load guest memory: {error}"
        ) from error
    if size != facts["mem_mib"] << 20 or hashlib.sha256(blocks).hexdigest() != facts["digest"]:
        raise RestoreError("Failed to load guest memory: this memory is not the one the state was saved with")
    for path in facts["drives"].values():
        see_disk(path)
    for override in content.get("network_overrides") or ():
        facts["cards"][override["iface_id"]]["host_dev_name"] = override["host_dev_name"]
    for card in facts["cards"].values():
        tap = card["host_dev_name"]
        try:
            connect(tap)
        except OSError as error:
            raise RestoreError(
                "Failed to build microVM from snapshot: Failed to restore devices: Error restoring MMIO devices: Net: "
                "Failed to create a network device: Open tap device failed: Error while creating ifreq structure: "
                f"{error.strerror} (os error {error.errno}). Invalid TUN/TAP Backend provided by {tap}. Check our "
                "documentation on setting up the network devices."
            ) from error
    if content.get("vsock_override"):
        facts["vsock"] = content["vsock_override"]["uds_path"]
    listener = None if facts["vsock"] is None else bind(facts["vsock"])
    try:
        machine = SimulatedMicroVm(facts, json.loads(data), listener, cmdline="", selector=selector)
    except ValueError as error:
        raise RestoreError(f"Failed to restore devices: {error}") from error
    machine.track = bool(content.get("track_dirty_pages") or content.get("enable_diff_snapshots"))
    machine.knows(blocks)
    if not content.get("resume_vm"):
        machine.pause()
    return machine


def runs_trial(kernel: str, *, works: bool) -> bool:
    """If *kernel* is the smallest guest there is, do what it would: say its word and end, or nothing for ever."""
    found = _TRIAL.search(Path(kernel).read_bytes())
    if found is None:
        return False
    if not works:
        threading.Event().wait()
    sys.stdout.buffer.write(found[1])
    sys.stdout.flush()
    os._exit(0)
