"""``noid config``: settings of the command line, and the predecessor's kernel and rootfs as an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from noid.testing.simulated_image import simulated_files


def test_kernel_and_rootfs_together_become_the_default_image_of_this_machine(offline_noid: Any, tmp_path: Path) -> None:
    kernel, _, rootfs = simulated_files(tmp_path)
    done = offline_noid("config", "set", "kernel", str(kernel))
    assert done.stdout.decode() == f"kernel = {kernel}\n"
    assert b"Next: noid config set rootfs PATH" in done.stderr
    done = offline_noid("config", "set", "rootfs", str(rootfs))
    assert (done.returncode, done.stdout.decode()) == (0, f"rootfs = {rootfs}\n")
    assert b"Image 'default'" in done.stderr
    image = offline_noid.home / ".noid" / "images" / "default"
    assert (image / "rootfs").exists() or list(image.glob("rootfs*"))
    offline_noid("config", "set", "kernel", str(kernel))  # again: it is ours, and is replaced without a question
    assert json.loads(offline_noid("config", "list", "--json").stdout) == {"kernel": str(kernel), "rootfs": str(rootfs)}


def test_files_that_are_no_image_are_said_to_be_none(offline_noid: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no kernel")
    offline_noid("config", "set", "kernel", str(tmp_path / "text"))
    done = offline_noid("config", "set", "rootfs", str(tmp_path / "text"))
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: ")
    assert str(tmp_path / "text").encode() in done.stderr


def test_settings_are_shown_and_taken_back(offline_noid: Any) -> None:
    assert offline_noid("config", "list").stdout == b"Nothing is set.\n"
    assert offline_noid("config", "set", "update.url", "https://host/dist/").returncode == 0
    assert offline_noid("config", "get", "update.url").stdout == b"https://host/dist/noid.pyz\n"
    assert offline_noid("config", "unset", "update.url").returncode == 0
    done = offline_noid("config", "get", "update.url")
    assert done.returncode == 1
    assert b"noid config set update.url VALUE" in done.stderr
    assert offline_noid("config", "unset", "update.url").returncode == 0


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("colour", "green", b"There are: kernel, rootfs, console.detach, update.url"),
        ("kernel", "/no/such/file", b"there is no file /no/such/file"),
        ("update.url", "http://host/noid.pyz", b"without TLS anybody on the way could send another"),
        ("update.url", "ftp://host/noid.pyz", b"is not a URL to download noid from"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(offline_noid: Any, key: str, value: str, said: bytes) -> None:
    done = offline_noid("config", "set", key, value)
    assert done.returncode == 1
    assert said in done.stderr
    assert not (offline_noid.home / ".noid").exists()
