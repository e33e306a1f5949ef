"""A server's life as a process: what systemd hears, what SIGHUP changes and what not, TLS, starts that cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from noid.core.config.settings import TlsConfig
from noid.errors import ConfigError
from noid.server import tls
from noid.testing.served import PATIENCE_SECS, PROGRAM, SIMULATED

Served = Any  # see conftest.py


class Line:
    """What a process writes to its log, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self._stream: IO[str] = process.stderr
        self.seen: list[str] = []

    def until(self, words: str) -> str:
        """Return the next line with *words* in it."""
        while line := self._stream.readline():
            self.seen.append(line)
            if words in line:
                return line
        raise AssertionError(f"{words!r} was never said: {self.seen}")


@pytest.fixture
def systemd(data_dir: Path) -> Iterator[socket.socket]:
    """The socket a service manager listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(data_dir / "notify"))
        sock.settimeout(PATIENCE_SECS)
        yield sock


def heard(systemd: socket.socket, word: str) -> dict[str, str]:
    """Return the next message that begins with *word*, as a mapping. Those of the watchdog are skipped."""
    while True:
        fields = dict(line.partition("=")[::2] for line in systemd.recv(4096).decode().splitlines())
        if "WATCHDOG" not in fields:
            assert word in fields, fields
            return fields


def test_systemd_hears_of_readiness_reloads_life_and_the_end(
    served: Served, systemd: socket.socket, reserved_port: int
) -> None:
    toml = served.data_dir / "server.toml"
    listen = f'listen = "127.0.0.1:{reserved_port}"\n'
    toml.write_text(listen + SIMULATED)
    process = served.start(NOTIFY_SOCKET=systemd.getsockname(), WATCHDOG_USEC="200000")
    log = Line(process)
    assert heard(systemd, "READY")["STATUS"].endswith(f"and http://127.0.0.1:{reserved_port}")
    for _ in range(3):
        while b"WATCHDOG=1" not in systemd.recv(4096):
            pass

    def reload(text: str) -> None:
        toml.write_text(text)
        process.send_signal(signal.SIGHUP)
        assert int(heard(systemd, "RELOADING")["MONOTONIC_USEC"]) > 0
        heard(systemd, "READY")

    def create(size: int) -> bytes:
        body = json.dumps({"name": "web", "image": "x" * size}).encode()
        head = f"POST /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        return bytes(served.ask(head.encode() + body)[9:12])

    assert create(9000) != b"413"
    reload(
        'listen = "127.0.0.1:1"\nboot_timeout_secs = 7\nmax_ws_sessions = 5\n[limits]\nmax_body_bytes = 5000\n[logging]'
        '\nformat = "json"\n' + SIMULATED
    )
    changed = json.loads(log.until("was read anew"))["message"]
    assert changed.endswith("changed: [limits] max_body_bytes, [logging] format, max_ws_sessions")
    fixed = json.loads(log.until("only a restart"))["message"]
    assert fixed.endswith(": boot_timeout_secs, listen")
    assert create(9000) == b"413"

    reload("max_ws_sesions = 3\n" + SIMULATED)
    wrong = json.loads(log.until("stays as it was"))
    assert wrong["level"] == "error"
    assert "max_ws_sessions" in wrong["message"]
    assert create(9000) == b"413"

    process.send_signal(signal.SIGTERM)
    assert "VMs keep running" in heard(systemd, "STOPPING")["STATUS"]
    assert process.wait(PATIENCE_SECS) == 0


def test_tls_is_served_and_takes_up_a_new_certificate_but_no_bad_one(served: Served, reserved_port: int) -> None:
    trustme = pytest.importorskip("trustme")
    certificate, key = served.data_dir / "cert.pem", served.data_dir / "key.pem"

    def issue() -> ssl.SSLContext:
        authority = trustme.CA()
        issued = authority.issue_cert("localhost", "127.0.0.1")
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        authority.cert_pem.write_to_path(str(served.data_dir / "ca.pem"))
        trust = ssl.create_default_context()
        authority.configure_trust(trust)
        return trust

    def ask(trust: ssl.SSLContext) -> bytes:
        with (
            socket.create_connection(("127.0.0.1", reserved_port), PATIENCE_SECS) as plain,
            trust.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            assert sock.version() in ("TLSv1.2", "TLSv1.3")
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            with sock.makefile("rb") as answer:
                return answer.read()

    first = issue()
    (served.data_dir / "server.toml").write_text(
        f'listen = "127.0.0.1:{reserved_port}"\n[tls]\ncertificate = "cert.pem"\nkey = "key.pem"\n{SIMULATED}'
    )
    process = served.start()
    log = Line(process)
    assert log.until("serving").endswith(f"and https://127.0.0.1:{reserved_port}\n")
    assert ask(first).endswith(b'{"status":"ok"}')

    second = issue()
    process.send_signal(signal.SIGHUP)
    log.until("was read anew")
    assert ask(second).startswith(b"HTTP/1.1 200")
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(first)

    key.write_bytes(trustme.CA().issue_cert("x").private_key_pem.bytes())
    process.send_signal(signal.SIGHUP)
    assert "is not the key of" in log.until("the certificate stays as it was")
    assert ask(second).startswith(b"HTTP/1.1 200")

    old = ssl.create_default_context(cafile=str(served.data_dir / "ca.pem"))
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask(old)

    command = [
        sys.executable,
        "-c",
        "from noid.cli.main import main; main()",
        "--server",
        f"https://127.0.0.1:{reserved_port}",
        "list",
    ]
    environment = {**os.environ, "SSL_CERT_FILE": str(served.data_dir / "ca.pem"), "NOID_TOKEN": f"noid_tok_{0:064}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "token" in done.stderr  # it was understood, and refused
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECS) == 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda certificate, key: key.unlink(), r"key: cannot read .*key\.pem: No such file"),
        (lambda certificate, key: certificate.write_text("none"), r"certificate: there is none in .*cert\.pem"),
        (lambda certificate, key: key.write_bytes(certificate.read_bytes()), r"key: there is none in .*key\.pem"),
        (lambda certificate, key: certificate.write_bytes(certificate.read_bytes()[:300]), "cannot be used"),
    ],
)
def test_a_certificate_that_cannot_be_is_said(
    tmp_path: Path, spoil: Callable[[Path, Path], object], words: str
) -> None:
    trustme = pytest.importorskip("trustme")
    issued = trustme.CA().issue_cert("localhost")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(str(certificate))
    issued.private_key_pem.write_to_path(str(key))
    assert tls.load(TlsConfig(certificate=certificate, key=key)) is not None
    spoil(certificate, key)
    with pytest.raises(ConfigError, match=words):
        tls.load(TlsConfig(certificate=certificate, key=key))


def test_half_of_a_certificate_and_an_encrypted_key_are_said(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    from cryptography.hazmat.primitives import serialization

    issued = trustme.CA().issue_cert("localhost")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(str(certificate))
    with pytest.raises(ConfigError, match="has a certificate and no key"):
        tls.load(TlsConfig(certificate=certificate))
    clear = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    key.write_bytes(
        clear.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="key is encrypted"):
        tls.load(TlsConfig(certificate=certificate, key=key))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[tls]\ncertificate = "nowhere.pem"\nkey = "nowhere.key"\n', "certificate: cannot read"),
        ("[limits]\nmax_conections = 1\n", "Did you mean 'max_connections'"),
        ("newer", "was written by a newer noid"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_status_1(served: Served, text: str, words: str) -> None:
    toml = served.data_dir / "server.toml"
    if text == "newer":
        process = served.start("--local")
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_SECS)
        with contextlib.closing(sqlite3.connect(served.data_dir / "noid.db")) as database, database:
            database.execute(
                "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('noid', 'from_next_year', '')"
            )
    else:
        toml.write_text(text + SIMULATED)
    process = served.start()
    *before, last = served.end(process).splitlines()
    assert process.returncode == 1
    assert served.said == ""
    assert last.startswith("Error: ")
    assert words in last
    assert all(re.match(r"\S+Z (INFO|WARNING) noid", line) for line in before)


def test_a_server_whose_terminal_closes_ends(served: Served) -> None:
    master, slave = pty.openpty()
    reading, writing = os.pipe()
    take_terminal = "import fcntl, os, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    command = [sys.executable, "-c", take_terminal + PROGRAM, "serve", "--local", "--data-dir", str(served.data_dir)]
    process = subprocess.Popen(
        [*command, "--ready-fd", str(writing)], stdin=slave, stderr=subprocess.PIPE, pass_fds=[writing], text=True
    )
    served.processes.append(process)
    os.close(slave)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "ready\n"
    process.send_signal(signal.SIGHUP)  # the terminal is there: a reload
    log = Line(process)
    log.until("was read anew")
    os.close(master)
    assert "stopping: SIGHUP" in log.until("stopping")
    assert process.wait(PATIENCE_SECS) == 0
