"""Types at one guest's serial line and hears what it answers: finding the shell, and one command's conversation.

Everything is bounded by what the caller waits for; a guest that says nothing is told apart from one that asks for a
login, from one without the programs this needs, and from one that would show secrets on its console.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections import deque
from collections.abc import AsyncIterator

import trio

from noid.core.backends import ConsoleListener, ConsolePort
from noid.errors import BackendError, DependencyDown
from noid_exec_serial import script
from noid_exec_serial.records import Record, RecordDecoder

ANSWER_SECS = 15.0
_FIRST_LOOK_SECS = 0.3
_ASK_AGAIN_SECS = (1.0, 5.0)
_TAIL_BYTES = 512
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x09\x0b-\x1f\x7f]")
_LOGIN = re.compile(rb"(?i)(login|user ?name|password|passphrase): *\Z")


class Line:
    """One stretch of listening and typing, with a nonce of its own. Made by `listening`."""

    def __init__(self, console: ConsolePort, listener: ConsoleListener) -> None:
        self.nonce = secrets.token_hex(5)
        self._console = console
        self._listener = listener
        self._decoder = RecordDecoder(self.nonce)
        self._records: deque[Record] = deque()
        self._tail = b""

    async def type(self, data: bytes) -> None:
        """Type *data*. Waits while the guest does not read."""
        await self._console.write(data)

    async def record(self) -> Record:
        """Return the next record.

        Raises:
            DependencyDown: the machine has ended.
            BackendError: so much was printed that a part of it is lost.
        """
        while not self._records:
            await self._hear()
        return self._records.popleft()

    async def expect(self, *kinds: str) -> Record:
        """Return the next record of one of *kinds*, skipping others; it must come within `ANSWER_SECS`.

        Raises:
            DependencyDown: it did not come, or the machine has ended.
            BackendError: the guest asks for a login.
        """
        with trio.move_on_after(ANSWER_SECS):
            while True:
                if not self._records:
                    self.refuse_login()
                record = await self.record()
                if record.kind in kinds:
                    return record
        raise self.silence()

    def refuse_login(self) -> None:
        """Raise if the guest's last words ask for a user or a password.

        Raises:
            BackendError: they do.
        """
        if _LOGIN.search(self._tail):
            raise BackendError(
                f"the guest's serial console asks for a login ({_shown(self._tail)!r}) where a shell should be. "
                "Let the image log in there by itself (agetty --autologin, or a shell on ttyS0), or use an image with "
                "noid's agent."
            )

    def silence(self) -> DependencyDown:
        """Return the error that says that no shell answers."""
        said = _shown(self._tail)
        return DependencyDown(
            "no shell answers on the guest's serial console: another program may run in its foreground, or the guest "
            f"hangs. {f'It said last: {said!r}.' if said else 'It said nothing.'} The VM still runs. End that program "
            "(noid console), or restore the VM from a checkpoint."
        )

    async def look(self, secs: float) -> None:
        """Hear what is printed within *secs*, for `refuse_login`."""
        with trio.move_on_after(secs):
            while True:
                await self._hear()

    def saw(self, typed: bytes) -> bool:
        """Return whether *typed* was among the last bytes heard: whether the guest echoes."""
        return typed in self._tail

    async def _hear(self) -> None:
        data = await self._listener.receive_some()
        if not data:
            raise DependencyDown("the machine of this guest has ended, and with it whatever ran there.")
        self._tail = _ESCAPES.sub(b"", self._tail + data)[-_TAIL_BYTES:]
        self._records.extend(self._decoder.feed(data))


@contextlib.asynccontextmanager
async def listening(console: ConsolePort) -> AsyncIterator[Line]:
    """Yield a line that hears what the guest prints from now on."""
    async with console.listen() as listener:
        yield Line(console, listener)


async def find_shell(console: ConsolePort) -> None:
    """Return once a shell waits at its prompt. Waits for ever for one that does not come: bound it.

    What a half typed line, a stopped output or an earlier connection's reader left is cleared away.

    Raises:
        BackendError: the guest asks for a login.
        DependencyDown: the machine has ended.
    """
    every_secs, most_secs = _ASK_AGAIN_SECS
    while True:
        async with listening(console) as line:
            await line.type(script.GO_ON + script.CLEAR + b"\n")
            await line.look(_FIRST_LOOK_SECS)
            line.refuse_login()
            await line.type(script.ABORT + script.question(line.nonce))
            with trio.move_on_after(every_secs):
                while (await line.record()).kind != "k":
                    pass
                return
            line.refuse_login()
        every_secs = min(every_secs * 1.5, most_secs)


def _shown(tail: bytes) -> str:
    lines = [text.strip() for text in tail.decode("ascii", "replace").split("\n")]
    return " | ".join(text for text in lines if text)[-120:]
