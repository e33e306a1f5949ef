"""The SDK with a real guest: commands, its terminal, files both ways, and a fork that goes on where it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio

import noid
import noid.sync
from noid.core import paths
from noid.errors import TooLarge

House = Any  # see conftest.py
pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def vm_of(shared_house: House) -> Any:
    """What makes a client with a VM ``sdk``, which all of these share."""
    shared_house.create("sdk")
    yield paths.socket_path(shared_house.data_dir)
    shared_house.ok("destroy", "sdk")


def furnish(tree: Path) -> dict[str, bytes]:
    """Make a tree, and return the files in it."""
    (tree / "sub").mkdir(parents=True)
    files = {"large": os.urandom(3 << 20), "sub/small": b"small", "sub/empty": b""}
    for name, content in files.items():
        (tree / name).write_bytes(content)
    return files


def contents(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


async def test_with_trio(vm_of: Path, tmp_path: Path) -> None:
    files = furnish(tmp_path / "tree")
    client = noid.Client(socket=vm_of)
    vm = await client.vm("sdk")
    async with trio.open_nursery() as nursery:  # a client and a VM are shared by tasks
        for number in range(4):
            nursery.start_soon(vm.write_file, f"/tmp/file-{number}", f"{number}")
    assert (await vm.run(["sh", "-c", "cat /tmp/file-?"], check=True)).text == "0123"

    copied = await vm.copy_in(tmp_path / "tree", "/tmp/tree")
    assert (copied.left_out, copied.entries) == ([], 5)
    await vm.copy_out("/tmp/tree", tmp_path / "back")
    assert contents(tmp_path / "back") == files
    assert await vm.read_file("/tmp/tree/large") == files["large"]
    with pytest.raises(TooLarge, match="more than 1000 bytes"):
        await vm.read_file("/tmp/tree/large", bytes_max=1000)
    with pytest.raises(noid.ServerError) as refused:
        await vm.read_file("/nothing")
    assert refused.value.status == 404

    async with vm.exec(["sh"], tty=(100, 30)) as shell:
        await shell.send("stty size; exit 7\n")
        done = await shell.wait()
    assert ("30 100" in done.text, done.exit_code) == (True, 7)


def test_without_trio(vm_of: Path, tmp_path: Path) -> None:
    files = furnish(tmp_path / "tree")
    vm = noid.sync.Client(socket=vm_of).vm("sdk")
    vm.copy_in(tmp_path / "tree", "/root/tree")
    vm.copy_out("/root/tree/sub/.", tmp_path)
    assert (tmp_path / "small").read_bytes() == b"small"
    assert vm.run(["cat"], input=files["large"]).stdout == files["large"]

    # Renamed into place: a file that is being written anew is empty for a moment.
    count = "n=0; while sleep .05; do echo $((n=n+1)) > /dev/shm/.n; mv /dev/shm/.n /dev/shm/n; done"
    vm.start_process(["sh", "-c", count])
    with vm.exec(["sh", "-c", "until [ -e /dev/shm/n ]; do sleep .05; done; cat /dev/shm/n"]) as process:
        before = int(process.wait().text)
    [copy] = vm.fork()
    try:
        assert int(copy.run(["cat", "/dev/shm/n"], check=True).text) >= before
        assert copy.read_file("/root/tree/large") == files["large"]
    finally:
        copy.destroy()
