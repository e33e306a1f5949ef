"""What a guest tells of its processes: what they write, what they used, how they ended."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputChunk:
    """Bytes a process wrote. *stream* is 1 for stdout, 2 for stderr.

    A process' output is one log: the bytes of both streams in the order the guest read them, counted together from 0.
    *offset* is that of the first byte of *data*.
    """

    stream: int
    data: bytes = field(repr=False)
    offset: int = 0

    @property
    def end(self) -> int:
        """The offset of what follows."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process used in its life."""

    user_secs: float
    system_secs: float
    rss_max_kib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessExit:
    """How a process in a guest ended: with *code*, or by *signal*. *status* is what a shell would show."""

    code: int | None
    signal: int | None = None
    usage: Usage | None = field(default=None, compare=False)

    @property
    def status(self) -> int:
        """The exit code, or 128 plus the signal."""
        return self.code if self.code is not None else 128 + (self.signal or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestProcessInfo:
    """A process as its guest tells of it. The guest keeps bytes *log_start* up to *log_end* of its output.

    *id* was chosen by the host that started it and is the same for the life of the guest, in checkpoints and clones
    too. *stdin* is whether it still takes input. *exit* is None while it runs.
    """

    id: int
    pid: int
    running: bool
    tty: bool
    stdin: bool
    log_start: int
    log_end: int
    exit: ProcessExit | None
    started_at_unix_ns: int
    label: str = field(repr=False)
