"""A server in a VM is reached from here, whatever network the VM has."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import tarfile
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

PATIENCE_SECS = 60
PAGE = b"<h1>hello</h1>\n"


@contextlib.contextmanager
def opened(house: House, *arguments: str) -> Iterator[str]:
    """Run a command that forwards, and yield its first line."""
    with house.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        try:
            yield running.stdout.readline().decode().strip()
        finally:
            running.send_signal(signal.SIGINT)
            _, complaints = running.communicate(timeout=PATIENCE_SECS)
    assert running.returncode == 130, complaints


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=PATIENCE_SECS) as reply:  # noqa: S310  # a URL of ours
        return bytes(reply.read())


def test_a_page_that_a_vm_serves_is_seen_here_and_in_its_copies(noid: House) -> None:
    big = os.urandom(3 << 20)
    noid.create("web")
    noid.ok("cp", "-", "web:/srv", stdin=tar_of({"index.html": PAGE, "big": big}))
    noid.guest("web", "httpd -p 127.0.0.1:80 -h /srv")

    with opened(noid, "open", "web") as url:  # the only port there is
        assert url.startswith("http://127.0.0.1:")
        assert fetched(url) == PAGE
        checkpoint = noid.checkpoint("web")
        assert hashlib.sha256(fetched(f"{url}big")).digest() == hashlib.sha256(big).digest()
        noid.ok("restore", "web", checkpoint, "--as", "copy")
        with opened(noid, "port-forward", "copy", ":80", "-q") as there:
            assert fetched(f"http://{there}/") == PAGE
        noid.ok("restore", "web", checkpoint)
        assert fetched(url) == PAGE  # the port stays, whichever machine is behind it

    request = b"GET / HTTP/1.0\r\n\r\n"
    assert noid("port-forward", "--stdio", "web", "80", stdin=request).out.endswith(PAGE)
    refused = noid("port-forward", "--stdio", "web", "81")
    assert refused.code == 1
    assert b"nothing listens at localhost:81" in refused.err


def tar_of(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return made.getvalue()
