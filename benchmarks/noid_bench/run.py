"""One run of the bench: rigs, figures, and what has to be there for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import click
import trio

from noid.core import paths
from noid.core.layout import Layout
from noid.core.vms import processes
from noid.server.serve import serve_until
from noid_bench import commands, measures
from noid_bench.report import Figure
from noid_bench.rig import MEM_MIB, Rig, btrfs_directory, image_to_use, open_rig, scratch_directory


async def measure(image: str | None, rounds: int, parent: Path) -> list[Figure]:
    """Measure everything with *rounds* samples each, working below *parent*; nothing is left there.

    Raises:
        NotFound: there is no such image.
    """
    images = Layout(paths.data_dir()).images
    name = await trio.to_thread.run_sync(image_to_use, images, image)
    figures: list[Figure] = []
    with scratch_directory(parent) as data_dir:
        environment = {**os.environ, "NOID_DATA_DIR": str(data_dir)}
        async with open_rig(data_dir, "overlay", name, images) as rig, _served(rig):
            _say("create from golden")
            figures += await measures.create_from_golden(rig, rounds)
            _say("checkpoint pause, overlay")
            figures.append(await measures.checkpoint_pause(rig, rounds, "overlay"))
            figures += await measures.copied_by_a_clone(rig)
            _say("ten clones at once")
            figures.append(await measures.ten_clones(rig, max(2, rounds // 2)))
            _say("commands")
            figures.append(await measures.exec_command(rig, rounds, environment))
            figures.append(await measures.list_command(rounds, environment))
            _say("output, input and answers of commands")
            figures += await commands.commands(rig, rounds)
        _say("checkpoint pause, btrfs")
        figures.insert(3, await _pause_on_btrfs(name, images, rounds, parent))
        _say("idle agent")
        figures += await _idle(name, images, data_dir, environment)
    return figures


async def _pause_on_btrfs(image: str, images: Path, rounds: int, parent: Path) -> Figure:
    with btrfs_directory(parent) as directory:
        if directory is None:
            why = "needs root, mkfs.btrfs and loop mounts"
            return Figure(name="checkpoint pause, btrfs", unit="ms", must=15.0, aim=5.0, skipped=why)
        async with open_rig(directory / "noid", "btrfs", image, images) as rig:
            return await measures.checkpoint_pause(rig, rounds, "btrfs")


async def _idle(image: str, images: Path, data_dir: Path, environment: dict[str, str]) -> list[Figure]:
    """Measure an agent of its own process, with idle clones."""
    with agent_process(data_dir, environment):
        noid = str(Path(sys.executable).with_name("noid"))
        names = [f"idle-{number}" for number in range(measures.CLONES)]
        for name in names:
            shape = ("--image", image, "--mem", str(MEM_MIB))
            await trio.run_process([noid, "create", name, *shape], env=environment, capture_stdout=True, cwd="/")
        pid = int((data_dir / "agent.lock").read_text())
        vmms = [int(process) for process in _vmm_pids(data_dir) if process != pid]
        figures = await measures.idle_agent(pid, vmms)
        for name in names:
            await trio.run_process([noid, "destroy", name], env=environment, capture_stdout=True, cwd="/")
        return figures


@contextlib.contextmanager
def agent_process(data_dir: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a local agent until the end of the block."""
    argv = [sys.executable, "-m", "noid.server", "serve", "--local", "--data-dir", str(data_dir)]
    reader, writer = os.pipe()
    with (data_dir / "agent.log").open("ab") as log:
        process = subprocess.Popen(  # ours
            [*argv, "--ready-fd", str(writer)], env=environment, stdout=log, stderr=log, pass_fds=(writer,)
        )
    os.close(writer)
    try:
        os.read(reader, 16)
        yield
    finally:
        os.close(reader)
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@contextlib.asynccontextmanager
async def _served(rig: Rig) -> AsyncIterator[None]:
    """Serve the rig's agent on its socket, for the commands."""
    stopping, ready = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_serve, stopping, ready, rig)
        await ready.wait()
        try:
            yield
        finally:
            stopping.set()


async def _serve(stopping: trio.Event, ready: trio.Event, rig: Rig) -> None:
    await serve_until(stopping, rig.agent, rig.agent.config, ready=ready.set)


def _vmm_pids(data_dir: Path) -> list[int]:
    return [process.pid for process in processes.find(data_dir)]


def _say(what: str) -> None:
    click.echo(f"measuring {what} ...", err=True)
