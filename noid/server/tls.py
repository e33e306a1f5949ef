"""TLS of the server: a certificate and its key, read into what new connections are given."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from noid.core.config.settings import TlsConfig
from noid.errors import ConfigError


def load(config: TlsConfig) -> ssl.SSLContext | None:
    """Return what *config* names, read from its files; None when it names nothing. TLS 1.2 and 1.3, HTTP/1.1.

    Raises:
        ConfigError: a file cannot be read, is not what it should be, or the two do not belong together.
    """
    certificate, key = config.certificate, config.key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        there, missing = ("key", "certificate") if certificate is None else ("certificate", "key")
        raise ConfigError(f"[tls] has a {there} and no {missing}. Name both, or none.")
    _check("certificate", certificate, b"-----BEGIN CERTIFICATE-----")
    _check("key", key, b"PRIVATE KEY-----")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        reason = f"{certificate} and {key} cannot be used: {error}"
        if error.reason == "KEY_VALUES_MISMATCH":
            reason = f"{key} is not the key of {certificate}"
        raise ConfigError(f"[tls] {reason}. Give a certificate chain and its key, both PEM.") from error
    return context


def _check(what: str, path: Path, mark: bytes) -> None:
    """Say of one file what OpenSSL only says of both together."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"[tls] {what}: cannot read {path}: {error.strerror}. User {os.geteuid()} must be able to."
        ) from error
    if mark not in text:
        raise ConfigError(f"[tls] {what}: there is none in {path}. It must be a PEM file.")


def _no_password() -> str:
    """Refuse an encrypted key: OpenSSL would ask the terminal for a password."""
    raise ConfigError("[tls] key is encrypted. Decrypt it, and let only the server's user read it.")
