"""The line to one process of a guest: a connection, and the next one when that is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from noid.client.calls import processes
from noid.client.calls.call import with_query
from noid.client.errors import ConnectionFailed, ConnectionLost, ServerError
from noid.client.link import Link
from noid.client.process_protocol import Broken, ProcessProtocol
from noid.client.waiting import Source
from noid.client.websocket import NoWebSocket, WebSocket
from noid.core import wire
from noid.core.model.processes import ExecRequest
from noid.errors import DeadlineExceeded

RESULT_GRACE_SECS = 10.0
"""How much later than the request's own limit the result may come, before we stop believing in a server-side limit."""
REATTACH_SECS = 10.0
RETRY_SECS = 0.2
DETACH_SECS = 10.0
"""How long the agent may take to say that a process runs on without us."""
_FATE = "The command may have ended or not; the VM is not affected."


class ProcessLine:
    """Carries *protocol* to and from a process of the VM *name*. Open it with `run` or `attach`; close it after that.

    Where several tasks share it, each takes one of *turns* for a `step`.

    Closing it before the process has ended ends the process, if it was started here and not left.
    """

    def __init__(self, link: Link, name: str, protocol: ProcessProtocol) -> None:
        self.protocol = protocol
        self.turns = link.waiting.turns()
        self._link = link
        self._name = name
        self._ws: WebSocket | None = None
        self._lost: ConnectionLost | None = None
        self._resumes = False
        self._resumed_from: wire.Started | None = None
        self._resume_by: float | None = None
        self._result_by: float | None = None
        self._leave_by: float | None = None

    async def run(self, request: ExecRequest) -> None:
        """Start *request*. A connection that is lost is made again for `REATTACH_SECS`.

        Where there is no WebSocket to be had, and no input, it is run by a plain request: its output comes when it has
        ended.

        Raises:
            ConnectionFailed: nothing was started.
            ServerError: the agent refused. `ServerTooOld`: it cannot do all of that.
        """
        if request.timeout_secs is not None:
            self._result_by = time.monotonic() + request.timeout_secs + RESULT_GRACE_SECS
        first = wire.request_to_json(request, resume=True)
        try:
            await self._open(f"/v1/vms/{self._name}/exec", first, request)
        except NoWebSocket as error:
            await self._run_plainly(request, error)
        except ConnectionLost as error:
            raise ConnectionFailed(str(error).removeprefix("connection error: ")) from error
        self._resumes = True

    async def attach(self, process: str, *, from_start: bool = False, readonly: bool = False) -> None:
        """Attach to *process*, as one of its readers; *from_start* with all of its output that is kept.

        Raises:
            ConnectionFailed, ServerError: it is not affected.
        """
        path = f"/v1/vms/{self._name}/processes/{process}/attach"
        await self._open(with_query(path, readonly="1" if readonly else None, offset="0" if from_start else None))

    def leave(self) -> None:
        """Ask that the process shall run on; `step` until the protocol says that this is detached."""
        self.protocol.leave()
        self._leave_by = time.monotonic() + DETACH_SECS

    async def step(self, readers: Sequence[Source] = (), *, listening: bool = True) -> Sequence[Source]:
        """Send and receive what can be, once something can, or one of *readers* can be read: return those that can.

        Raises:
            ServerError: the agent could not run it, or does not say that it runs on.
            ConnectionLost: the connection to the agent, or the agent's to the guest, ended, and cannot be made again.
        """
        if self.protocol.is_over:
            return ()
        if self._lost is not None:  # making it again was given up, or cancelled
            await self._resume(self._lost)
        ws = self._ws
        if ws is None:
            raise RuntimeError("the line to this process is not open.")
        self.protocol.send()
        if ws.is_deaf:
            self.protocol.cannot_send()
        try:
            messages, ready = await ws.step(readers, secs=self._left(), listening=listening)
            for message in messages:
                self.protocol.handle(message)
                if self.protocol.result is not None:
                    break
        except Broken as broken:
            await self._resume(ws.lost(str(broken)))
            return ()
        except ConnectionLost as lost:
            await self._resume(lost)
            return ()
        if self._result_by is not None and time.monotonic() >= self._result_by and not self.protocol.is_over:
            self.protocol.result = wire.ExecResult(exit_code=None, timed_out=True)
        return ready

    def flush(self) -> None:
        """Send what can be sent at once."""
        if self._ws is not None:
            self._ws.flush()

    def close(self) -> None:
        """Hang up."""
        if self._ws is not None:
            self._ws.close()
            self._ws = None

    def _left(self) -> float | None:
        """Return for how long a step may wait."""
        now = time.monotonic()
        if self._leave_by is not None and now >= self._leave_by:
            raise ServerError(
                f"the agent did not say within {DETACH_SECS:g} s that the process runs on; what was typed before may "
                "not be read. Whether it does, `noid ps` says.",
                status=0,
                code=DeadlineExceeded.code,
            )
        limits = [limit - now for limit in (self._result_by, self._leave_by) if limit is not None]
        return min(limits) if limits else None

    async def _open(self, path: str, first: str | None = None, request: ExecRequest | None = None) -> None:
        self._ws = await WebSocket.open(self._link, path, fate=_FATE, turns=self.turns)
        if self._ws.old_version is not None and request is not None:
            try:
                self._heed_predecessor(request, self._ws.old_version)
            except BaseException:
                self.close()
                raise
        self.protocol.connect(self._ws.channels, first)

    async def _run_plainly(self, request: ExecRequest, why: NoWebSocket) -> None:
        if (version := await self._link.old_version()) is not None:
            from noid.client import predecessor

            self._heed_predecessor(request, version)
            await predecessor.check_vm(self._link, self._name)
        if request.stdin or request.tty is not None:
            raise why
        try:
            answer = await self._link.perform(processes.run(self._name, wire.request_to_json(request)))
        except ServerError as error:
            raise error from why
        self.protocol.handle((wire.STDOUT, answer["stdout"].encode("utf-8", "surrogateescape")))
        self.protocol.handle(json.dumps({key: value for key, value in answer.items() if key != "stdout"}))

    def _heed_predecessor(self, request: ExecRequest, version: str) -> None:
        from noid.client import predecessor  # with it comes what no other server needs

        predecessor.check_request(request, self._link.endpoint.address, version)
        self.protocol.expect_serial()

    async def _resume(self, lost: ConnectionLost) -> None:
        """Make the connection again, or raise *lost*."""
        self._lost = lost
        process, link = self.protocol.process, self._link
        if (
            self._resume_by is None or process is not self._resumed_from
        ):  # it was attached: only what comes after counts
            if self._resume_by is not None and isinstance(lost.__cause__, ServerError):
                raise lost  # the agent itself said that nobody knows
            self._resume_by = time.monotonic() + REATTACH_SECS
        else:
            await link.waiting.sleep(RETRY_SECS)
        self._resumed_from = process
        while self._resumes and self.protocol.can_resume and time.monotonic() < self._resume_by:
            assert process is not None  # noqa: S101  # what can_resume says
            path = f"/v1/vms/{self._name}/processes/{process.process}/attach"
            self.close()
            try:
                await self._open(with_query(path, offset=self.protocol.offset, lineage=process.lineage, resume="1"))
            except ConnectionFailed:
                pass  # the agent is not up yet
            except ServerError as error:
                if error.status not in (503, 504):
                    raise ConnectionLost(f"{lost} Attaching to it again failed: {error}.") from error
            else:
                self._lost = None
                return
            await link.waiting.sleep(RETRY_SECS)
        raise lost
