"""A command that runs in a guest, as its client sees it: what it writes, what it reads, how it ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from noid.client.calls import processes
from noid.client.completed import Completed
from noid.client.errors import ConnectionFailed
from noid.client.link import Link
from noid.client.process_line import ProcessLine
from noid.client.process_protocol import ProcessProtocol
from noid.core import wire
from noid.core.model.processes import ExecRequest, TerminalSize, checked_argv, checked_env
from noid.errors import TooLarge
from noid.sdk.stream import Stream

STDOUT, STDERR = wire.STDOUT, wire.STDERR
OUTPUT_BYTES_MAX = 64 << 20


class RunningProcess(Stream[tuple[int, bytes]]):
    """A process one is attached to. Iterate over it for what it writes: ``(channel, data)``, 1 stdout and 2 stderr.

    A connection that is lost is made again, with nothing lost or twice, if the process was started with `Vm.exec`.
    Leaving it before its end ends such a process; one that was only attached to runs on.
    """

    def __init__(
        self,
        link: Link,
        vm: str,
        argv: tuple[str, ...],
        opening: Callable[[ProcessLine], Awaitable[None]],
        output_bytes_max: int = OUTPUT_BYTES_MAX,
    ) -> None:
        self._protocol = ProcessProtocol(self._take, self._miss)
        self._line = ProcessLine(link, vm, self._protocol)
        super().__init__(self._line.turns)
        self._link, self._vm, self._argv = link, vm, argv
        self._opening = opening
        self._output_bytes_max = output_bytes_max
        self._held_bytes = 0
        self._missing = 0

    @property
    def id(self) -> str | None:
        """Which process of the VM it is; None before its server has said so."""
        return None if self._protocol.process is None else self._protocol.process.process

    async def __anext__(self) -> tuple[int, bytes]:
        """Return channel and data of what it wrote next, when that is there."""
        channel, data = await super().__anext__()
        self._held_bytes -= len(data)
        return channel, data

    async def send(self, data: bytes | str) -> None:
        """Give it *data* as input; return when that is on its way. What comes after its end is dropped.

        Raises:
            TooLarge: it writes so much, which nobody reads, that it cannot be held while its input goes.
        """
        unsent = memoryview(data.encode() if isinstance(data, str) else data)
        while unsent:
            await self._until(lambda: self._protocol.wants_input)
            if self._is_over():
                return
            self._protocol.give(bytes(unsent[: wire.CHUNK_BYTES]))
            unsent = unsent[wire.CHUNK_BYTES :]
            await self._flush()

    async def close_input(self) -> None:
        """Let it see the end of its input."""
        await self._until(lambda: self._protocol.has_begun)
        self._protocol.give(b"")
        await self._flush()

    async def resize(self, columns: int, rows: int) -> None:
        """Give its terminal another size."""
        self._protocol.resize(columns, rows)
        await self._flush()

    async def signal(self, signal: str | int) -> None:
        """Send *signal*, ``"TERM"`` or 15, to it and what it has started; one that has ended does not mind.

        Raises:
            Unsupported: the server does not say which process this is.
        """
        await self._until(lambda: self.id is not None)
        if self.id is not None and not self._is_over():
            await self._link.perform(processes.send_signal(self._vm, self.id, signal))

    async def leave(self) -> None:
        """Let it run on without this client. What was sent before reaches it.

        Raises:
            ServerError: the server does not say that it will.
        """
        if not self._is_over():
            self._line.leave()
            await self._flush()
            await self._until(lambda: self._protocol.detached)

    async def wait(self) -> Completed:
        """Read on until it ends, and return how, with what nobody has read before.

        Raises:
            ConnectionLost: the connection ended and could not be made again; nobody knows how it fares.
            TooLarge: what is left to read is more than can be held.
        """
        await self._until(lambda: False)
        result = self._protocol.result
        if result is None:
            raise ConnectionFailed("the process was left to run on, so its end is not known here.")
        output = {STDOUT: bytearray(), STDERR: bytearray()}
        while self._arrived:
            channel, data = self._arrived.popleft()
            output[channel] += data
        self._held_bytes = 0
        return Completed(
            argv=self._argv,
            exit_code=result.exit_code,
            signal=result.signal,
            timed_out=result.timed_out,
            missing=self._missing,
            stdout=bytes(output[STDOUT]),
            stderr=bytes(output[STDERR]),
        )

    # --- the stream -------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._opening(self._line)

    async def _step(self) -> None:
        await self._line.step()
        if self._held_bytes > self._output_bytes_max:
            raise TooLarge(
                f"more than {self._output_bytes_max} bytes of output were not read. Iterate over the process to take "
                "them as they come."
            )

    def _is_over(self) -> bool:
        return self._protocol.is_over

    def _close(self) -> None:
        self._line.close()

    async def _flush(self) -> None:
        self._line.flush()
        if not self._protocol.has_sent_all:
            self._turns.interrupt()  # who waits for output only would not see that there is room again
            await self._until(lambda: self._protocol.has_sent_all)

    def _take(self, channel: int, data: bytes) -> None:
        self._held_bytes += len(data)
        self._arrived.append((channel, data))

    def _miss(self, size: int) -> None:
        self._missing += size


def request_for(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: str | None,
    user: str | None,
    stdin: bool = False,
    tty: tuple[int, int] | None = None,
    timeout_secs: float | None = None,
) -> ExecRequest:
    """Return the request that the arguments of `Vm.exec` mean.

    Raises:
        InvalidRequest: no server would take it.
        TypeError: *argv* is a text; nothing here splits words as a shell does.
    """
    if isinstance(argv, str):
        raise TypeError(
            f"a command is a list of words, and this a text: {argv!r}. A shell runs it: ['sh', '-c', text]."
        )
    return ExecRequest(
        argv=checked_argv(list(argv)),
        env=checked_env([f"{key}={value}" for key, value in (env or {}).items()]),
        cwd=cwd,
        user=user,
        stdin=stdin or tty is not None,
        timeout_secs=timeout_secs,
        tty=None if tty is None else TerminalSize(columns=tty[0], rows=tty[1]),
    )
