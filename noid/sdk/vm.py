"""A VM, and everything that can be done with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from noid.client.calls import checkpoints as checkpoint_calls
from noid.client.calls import vms as calls
from noid.client.link import Link
from noid.core.model.connections import LOCALHOST
from noid.sdk.making import UNDO_SECS, made

if TYPE_CHECKING:
    from noid.client.answers import ProcessInfo, VmInfo
    from noid.client.completed import Completed
    from noid.client.copying import Copied
    from noid.client.waiting import Waiting
    from noid.sdk.checkpoint import Checkpoint
    from noid.sdk.connection import Connection
    from noid.sdk.console import Console
    from noid.sdk.log import Log
    from noid.sdk.process import Process
    from noid.sdk.running import RunningProcess

GRACE_SECS = 30.0
OUTPUT_BYTES_MAX = 64 << 20
FILE_BYTES_MAX = 64 << 20


class Vm:
    """A VM. *info* is what the server said of it last, by this object; `refresh` asks anew."""

    def __init__(self, link: Link, info: VmInfo) -> None:
        self.info = info
        self._link = link

    @property
    def name(self) -> str:
        """Its name."""
        return self.info["name"]

    @property
    def state(self) -> str:
        """``running``, ``paused``, ``stopped``, ``dead``, or on its way: as of the last answer."""
        return self.info["state"]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {self.state}>"

    # --- the machine ------------------------------------------------------------------------------------------------

    async def refresh(self) -> VmInfo:
        """Ask the server, and return the new `info`."""
        self.info = await self._link.perform(calls.get(self.name))
        return self.info

    async def stop(self, *, grace_secs: float = GRACE_SECS, force: bool = False) -> None:
        """Shut it down in order, and end it after *grace_secs*; with *force* at once, like pulling the plug."""
        self.info = await self._link.perform(calls.stop(self.name, grace_secs=grace_secs, force=force))

    async def start(self) -> None:
        """Boot it on its disk; done when its guest has booted."""
        self.info = await self._link.perform(calls.start(self.name))

    async def reboot(self, *, grace_secs: float = GRACE_SECS, force: bool = False) -> None:
        """Stop it as `stop` does, and start it."""
        self.info = await self._link.perform(calls.reboot(self.name, grace_secs=grace_secs, force=force))

    async def pause(self) -> None:
        """Make its CPUs stand still."""
        self.info = await self._link.perform(calls.pause(self.name))

    async def resume(self) -> None:
        """Let it go on."""
        self.info = await self._link.perform(calls.resume(self.name))

    async def rename(self, name: str) -> None:
        """Give it another name. Its guest is not told before its next start."""
        self.info = await self._link.perform(calls.rename(self.name, name))

    async def set_labels(self, labels: Mapping[str, str | None]) -> None:
        """Give it *labels*; one that is None goes, others stay."""
        self.info = await self._link.perform(calls.label(self.name, labels))

    async def destroy(self) -> None:
        """End and remove it; done when nothing is left. Its checkpoints stay."""
        await self._link.perform(calls.destroy(self.name))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    async def checkpoint(self, *, label: str | None = None, labels: Mapping[str, str] | None = None) -> Checkpoint:
        """Freeze memory, processes and disk at one instant; it runs on. If anything fails, it still does."""
        from noid.sdk.checkpoint import Checkpoint

        return Checkpoint(self._link, await self._link.perform(checkpoint_calls.take(self.name, label, labels=labels)))

    async def checkpoints(self) -> list[Checkpoint]:
        """Return its checkpoints, oldest first."""
        from noid.sdk.checkpoint import Checkpoint

        found = await self._link.perform(checkpoint_calls.of_vm(self.name))
        return [Checkpoint(self._link, info) for info in found]

    async def restore(self, checkpoint: str) -> None:
        """Put it back to the checkpoint of that id, in place. If that fails, it is as it was, and runs."""
        self.info = await self._link.perform(checkpoint_calls.restore(self.name, checkpoint))

    async def fork(self, names: Sequence[str] | int = 1, *, labels: Mapping[str, str] | None = None) -> list[Vm]:
        """Make copies of it as it is at this instant, and return them when their guests answer: all of them, or none.

        *names* is what they are called, or how many there shall be, whose names are then made up. What they were made
        from is removed again; it costs nothing but its disk.
        """
        if isinstance(names, str):
            raise TypeError(f"names is a list of names or a number, and this a text: {names!r}.")
        if isinstance(names, int):
            names = [f"{self.name[:50]}-{os.urandom(4).hex()}" for _ in range(names)]
        if not names:
            return []
        link, copies = self._link, list[Vm]()
        take = checkpoint_calls.take(self.name, "fork")
        origin = await made(link, take, lambda taken: checkpoint_calls.remove(taken["vm_name"], taken["id"]))
        try:
            for name in names:
                copy = checkpoint_calls.restore(self.name, origin["id"], name, labels=labels)
                copies.append(Vm(link, await made(link, copy, lambda vm: calls.destroy(vm["name"]))))
        except BaseException:
            with link.waiting.shielded(UNDO_SECS):
                for vm in copies:
                    await vm.destroy()  # noqa: ASYNC102  # shielded and bounded above
            raise
        finally:
            with link.waiting.shielded(UNDO_SECS):
                await link.perform(checkpoint_calls.remove(origin["vm_name"], origin["id"]))  # noqa: ASYNC102  # the same
        return copies

    # --- commands ---------------------------------------------------------------------------------------------------

    async def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | str | None = None,  # what subprocess.run calls it
        check: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout_secs: float | None = None,
        output_bytes_max: int = OUTPUT_BYTES_MAX,
    ) -> Completed:
        """Run a command, give it *input*, and return how it ended with what it wrote. No shell is involved.

        Its output is held here, and is at most *output_bytes_max*. After *timeout_secs* the server ends it. A
        cancellation ends it too. A connection that is lost is made again, and nothing is run twice.

        Raises:
            CommandFailed: with *check*, its exit code is not 0.
            TooLarge: it writes too much; it is ended.
            ServerError: it could not be run. `ConnectionLost`: nobody knows how it fared.
        """
        from noid.sdk.running import RunningProcess, request_for

        request = request_for(argv, env=env, cwd=cwd, user=user, stdin=input is not None, timeout_secs=timeout_secs)
        process = RunningProcess(self._link, self.name, request.argv, lambda line: line.run(request), output_bytes_max)
        async with process:
            if input is not None:
                await process.send(input)
                await process.close_input()
            completed = await process.wait()
        return completed.check() if check else completed

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bool = False,
        tty: tuple[int, int] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout_secs: float | None = None,
    ) -> RunningProcess:
        """Return a command that begins when it is entered: ``async with vm.exec([...]) as process:``.

        With *stdin* it can be sent input, and waits for its end. *tty* are columns and rows of a terminal, which
        implies *stdin*. Leaving the block ends it.
        """
        from noid.sdk.running import RunningProcess, request_for

        request = request_for(argv, env=env, cwd=cwd, user=user, stdin=stdin, tty=tty, timeout_secs=timeout_secs)
        return RunningProcess(self._link, self.name, request.argv, lambda line: line.run(request))

    async def start_process(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Process:
        """Start a command that runs on whatever its client does."""
        from noid.client.calls import processes
        from noid.core import wire
        from noid.sdk.running import request_for

        command = wire.request_to_json(request_for(argv, env=env, cwd=cwd, user=user))
        return self._process(await self._link.perform(processes.start(self.name, command)))

    async def processes(self) -> list[Process]:
        """Return its processes, oldest first, also those that have ended and are still known."""
        from noid.client.calls import processes

        return [self._process(info) for info in await self._link.perform(processes.every(self.name))]

    def _process(self, info: ProcessInfo) -> Process:
        from noid.sdk.process import Process

        return Process(self._link, self.name, info)

    # --- what it shows ----------------------------------------------------------------------------------------------

    def console(self, *, history: int | None = None, readonly: bool = False) -> Console:
        """Return its serial console, to be entered; it begins with the last *history* bytes that were shown."""
        from noid.sdk.console import Console

        return Console(self._link, self.name, history=history, readonly=readonly)

    def logs(self, log: str = "console", *, offset: int = 0, follow: bool = False) -> Log:
        """Return what its console, or the process *log*, has written, to be entered.

        It begins at byte *offset*, counted from the end if that is negative, and with *follow* it goes on as the log
        grows.
        """
        from noid.sdk.log import Log

        return Log(self._link, self.name, log, offset=offset, follow=follow)

    # --- ports ------------------------------------------------------------------------------------------------------

    def connect(self, port: int, *, host: str = LOCALHOST) -> Connection:
        """Return a TCP connection to a port of it, made when it is entered, from inside: it needs no network for that.

        *host* is another IP address, which its guest can reach.
        """
        from noid.sdk.connection import Connection

        return Connection(self._link, self.name, port, host)

    # --- files ------------------------------------------------------------------------------------------------------

    async def read_file(self, path: str, *, user: str | None = None, bytes_max: int = FILE_BYTES_MAX) -> bytes:
        """Return what the file *path* has in it, as *user* or the image's user sees it.

        Raises:
            TooLarge: it is longer than *bytes_max*.
            ServerError: it cannot be read; the guest's words say why.
        """
        from noid.sdk.files import read_file

        return await read_file(self._link, self.name, path, user, bytes_max)

    async def write_file(
        self, path: str, data: bytes | str, *, mode: int | None = None, user: str | None = None
    ) -> None:
        """Make the file *path* consist of *data*: entirely, or it is as it was before. *mode* None keeps its mode.

        Raises:
            ServerError: it cannot be written; the guest's words say why.
        """
        from noid.sdk.files import write_file

        await write_file(self._link, self.name, path, data.encode() if isinstance(data, str) else data, mode, user)

    async def copy_in(
        self, source: str | os.PathLike[str], target: str, *, user: str | None = None, owners: bool = False
    ) -> Copied:
        """Copy a local file or directory to *target* in it, as ``cp -a`` would; *owners* too where root writes.

        Raises:
            NoidError: what could not be; of a directory, what came before stays.
        """
        from noid.client.copying import Copying
        from noid.client.files import GuestPath

        def copy(waiting: Waiting) -> Copied:
            copying = Copying(endpoint=self._link.endpoint, waiting=waiting, owners=owners)
            copying.into_guest(os.fspath(source), GuestPath(vm=self.name, path=target, user=user))
            return copying.done

        return await self._link.waiting.work(copy)

    async def copy_out(
        self, source: str, target: str | os.PathLike[str], *, user: str | None = None, owners: bool = False
    ) -> Copied:
        """Copy its file or directory *source* to *target* here, as ``cp -a`` would. Nothing lands outside of *target*.

        Raises:
            NoidError: what could not be; of a directory, what came before stays.
        """
        from noid.client.copying import Copying
        from noid.client.files import GuestPath

        def copy(waiting: Waiting) -> Copied:
            copying = Copying(endpoint=self._link.endpoint, waiting=waiting, owners=owners)
            copying.out_of_guest(GuestPath(vm=self.name, path=source, user=user), os.fspath(target))
            return copying.done

        return await self._link.waiting.work(copy)
