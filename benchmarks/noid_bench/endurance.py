"""Thousands of commands in one VM, in a row and all at once, through the server: nothing may grow by it.

Looks at three places before and after: the server, the VMM, and the agent inside the guest. What is compared is what
each has to itself (``RssAnon``): pages of a program's file come and go with the host's mood. A VMM's memory is its
guest's, which grows as the guest touches it, so it is told but not judged.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from noid.client import exec_stream
from noid.client.settings import Endpoint
from noid.core.model.processes import ExecRequest
from noid.errors import BackendError

SERVER_GROWTH_KIB_MAX = 16 * 1024
AGENT_GROWTH_KIB_MAX = 128
TOGETHER_SECS = 120.0

# What the shell says of the agent's process: its files, its memory; then how many processes the guest has beside it.
_LOOK = """
set -- /proc/{pid}/fd/*; echo $#
while read -r key value unit; do [ $key = RssAnon: ] && echo $value; done < /proc/{pid}/status
set -- /proc/[0-9]*; echo $#
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a server with one VM takes. Memory is in KiB."""

    server_files: int
    server_children: int
    server_kib: int
    vmm_files: int
    vmm_kib: int
    agent_files: int
    agent_kib: int
    guest_processes: int

    def growth(self, before: Footprint) -> list[str]:
        """Return what is more than it was *before* and must not be, in words."""
        allowed = {"server_kib": SERVER_GROWTH_KIB_MAX, "agent_kib": AGENT_GROWTH_KIB_MAX}
        return [
            f"{name}: {was} before, {now} after"
            for name in (field.name for field in fields(self))
            if name != "vmm_kib"
            and (now := getattr(self, name)) > (was := getattr(before, name)) + allowed.get(name, 0)
        ]

    def __str__(self) -> str:
        """Show all of it in one line."""
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Endurance:
    """One VM of a local server, and the pids of both. *agent_pid* is the guest agent's, in the guest."""

    endpoint: Endpoint
    vm: str
    server_pid: int
    vmm_pid: int
    agent_pid: int = 1

    def footprint(self) -> Footprint:
        """Look at everything now."""
        agent_files, agent_kib, guest_processes = map(
            int, self._run("sh", "-c", _LOOK.format(pid=self.agent_pid)).split()
        )
        return Footprint(
            server_files=_files(self.server_pid),
            server_children=len(Path(f"/proc/{self.server_pid}/task/{self.server_pid}/children").read_text().split()),
            server_kib=_kib(self.server_pid),
            vmm_files=_files(self.vmm_pid),
            vmm_kib=_kib(self.vmm_pid),
            agent_files=agent_files,
            agent_kib=agent_kib,
            guest_processes=guest_processes,
        )

    def in_a_row(self, count: int) -> None:
        """Run *count* commands, one after the other, and check what each says.

        Raises:
            BackendError: one said something else.
        """
        for number in range(count):
            if self._run("echo", str(number)) != f"{number}\n".encode():
                raise BackendError(f"command {number} did not say its number")

    def at_once(self, count: int) -> None:
        """Run *count* commands that all live at the same moment, each with input and output of its own.

        Raises:
            BackendError: one said something else, or they never were there all together.
        """
        together = threading.Barrier(count + 1)
        with concurrent.futures.ThreadPoolExecutor(count) as pool, contextlib.ExitStack() as stack:
            pipes = [stack.enter_context(_pipe()) for _ in range(count)]
            running = [pool.submit(self._meet, number, pipe[0], together) for number, pipe in enumerate(pipes)]
            try:
                together.wait(TOGETHER_SECS)  # now each has said its number and waits for input
            except threading.BrokenBarrierError:
                together.abort()
            for number, (_, writer) in enumerate(pipes):
                os.write(writer, f"{number} again\n".encode())
            for number, future in enumerate(running):
                if (said := future.result()) != (wanted := f"{number}\n{number} again\n".encode()):
                    raise BackendError(f"command {number} said {said!r} and not {wanted!r}")
        if together.broken:
            raise BackendError(f"{count} commands never ran all at the same time")

    def _meet(self, number: int, stdin_fd: int, together: threading.Barrier) -> bytes:
        met = False

        def meet() -> None:
            nonlocal met
            if not met:
                met = True
                with contextlib.suppress(threading.BrokenBarrierError):
                    together.wait(TOGETHER_SECS)

        return self._run("sh", "-c", f"echo {number}; read -r line; echo $line", stdin_fd=stdin_fd, heard=meet)

    def _run(self, *argv: str, stdin_fd: int | None = None, heard: Callable[[], None] | None = None) -> bytes:
        output = bytearray()

        def take(channel: int, data: bytes) -> None:
            del channel
            output.extend(data)
            if heard is not None:
                heard()

        request = ExecRequest(argv=argv, stdin=stdin_fd is not None)
        conversation = exec_stream.Conversation(on_output=take, stdin_fd=stdin_fd)
        result = exec_stream.run(self.endpoint, self.vm, request, conversation)
        if result is None or result.exit_code != 0:
            raise BackendError(f"{argv} ended with {result and result.exit_code} in VM {self.vm!r}: {bytes(output)!r}")
        return bytes(output)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def _files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])
