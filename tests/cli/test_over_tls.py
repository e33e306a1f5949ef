"""https: the same client, a certificate that is checked, and streams that TLS cuts into records of its own."""

from __future__ import annotations

import contextlib
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

from noid.client import connecting

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


def made(directory: Path, name: str, *options: str) -> tuple[Path, Path]:
    cert, key = directory / "cert.pem", directory / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run([*make, *subject, *options, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def refused(agent: Any, noid: Any, certificate: tuple[Path, Path]) -> str:
    """Return what is said of a server with that certificate, which is trusted as far as its signature goes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as secured:
                secured.recv(1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = f"https://localhost:{listener.getsockname()[1]}"
        done = noid("--server", address, "list", SSL_CERT_FILE=str(certificate[0]))
        thread.join(PATIENCE_SECS)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    return str(done.stderr.decode())


def test_a_certificate_that_is_over_or_for_another_name_is_told_from_one_nobody_vouches_for(
    noid: Any, agent: Any, tmp_path: Path
) -> None:
    expired = ssl.SSLCertVerificationError(1, "certificate verify failed")
    expired.verify_code, expired.verify_message = 10, "certificate has expired"  # openssl makes none that has
    assert connecting._reason(expired) == "certificate has expired"
    assert "has to renew its certificate, unless the clock of this machine is wrong" in connecting._tls_hint(expired)
    said = refused(agent, noid, made(tmp_path, "other.example", "-days", "2"))
    assert "Hostname mismatch, certificate is not valid for 'localhost'" in said
    assert "Use the name that its certificate is for" in said


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
