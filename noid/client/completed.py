"""How a command in a guest ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from noid.client.errors import CommandFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """How a command ended, and what it wrote that was not read before.

    Attributes:
        exit_code: What a shell would show, 128 plus its number for a signal; None after a timeout, or if nobody knows.
        signal: The number of the signal that ended it.
        timed_out: Whether it was ended because its time was over.
        missing: How many bytes of its output nobody has any more, because they were read too late.
    """

    argv: tuple[str, ...]
    exit_code: int | None
    signal: int | None = None
    timed_out: bool = False
    missing: int = 0
    stdout: bytes = field(default=b"", repr=False)
    stderr: bytes = field(default=b"", repr=False)

    @property
    def text(self) -> str:
        """Its stdout as text; what is no UTF-8 is replaced."""
        return self.stdout.decode("utf-8", "replace")

    def check(self) -> Completed:
        """Return this if the exit code is 0.

        Raises:
            CommandFailed: it is not.
        """
        if self.exit_code != 0:
            raise CommandFailed(self)
        return self
