"""https: the same client, a certificate that is checked, and streams that TLS cuts into records of its own."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE_SECS = 20.0

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    subprocess.run([*make, *subject, "-keyout", key, "-out", cert], check=True, capture_output=True, timeout=60)
    return cert, key


@pytest.fixture
def tls_agent(agent: Any, certificate: tuple[Path, Path]) -> Iterator[Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with socket.create_server(("127.0.0.1", 0)) as plain, context.wrap_socket(plain, server_side=True) as listener:
        scripted = type(agent)(listener)
        thread = threading.Thread(target=scripted.serve)
        thread.start()
        yield scripted
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_SECS)
    assert not scripted.problems


def url(agent: Any) -> str:
    return f"https://localhost:{agent.listener.getsockname()[1]}"


def test_a_trusted_server_is_used_for_requests_and_for_streams_in_both_directions(
    noid: Any, tls_agent: Any, certificate: tuple[Path, Path]
) -> None:
    noid.env |= {"NOID_URL": url(tls_agent), "SSL_CERT_FILE": str(certificate[0])}
    tls_agent.answers("GET", "/v1/vms", 200, [])
    assert noid("list").stdout == b"No VMs found.\n"

    def echo(exchange: Any) -> None:
        exchange.request()
        while (message := exchange.receive()[1]) != b"\x03":
            exchange.send(1, message[1:])
        exchange.end(7)

    tls_agent.runs(echo)
    data = os.urandom(2_000_000)
    done = noid("exec", "web", "-i", "--", "cat", stdin=data)
    assert (done.returncode, done.stderr) == (7, b"")
    assert done.stdout == data


def test_a_certificate_nobody_vouches_for_is_refused(noid: Any, tls_agent: Any) -> None:
    done = noid("--server", url(tls_agent), "list")
    assert done.returncode == 1
    assert b"self-signed certificate" in done.stderr
    assert b"in SSL_CERT_FILE." in done.stderr
    assert tls_agent.requests == []


def test_a_server_with_tls_that_is_asked_without_it_is_said_to_be_perhaps_one(noid: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closing:

        def read_and_close() -> None:
            with closing.accept()[0] as connection:
                connection.recv(65536)  # or closing would be a reset

        thread = threading.Thread(target=read_and_close)
        thread.start()
        done = noid("--server", f"http://localhost:{closing.getsockname()[1]}", "list")
        thread.join(PATIENCE_SECS)
    assert done.returncode == 1
    assert b"https://" in done.stderr


def test_https_to_a_port_without_tls_is_a_connection_error(noid: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        thread = threading.Thread(target=lambda: plain.accept()[0].close())
        thread.start()
        done = noid("--server", f"https://localhost:{plain.getsockname()[1]}", "list")
        thread.join(PATIENCE_SECS)
    assert done.returncode == 1
    assert b"connection error: cannot connect" in done.stderr
