"""Replacing the single file that noid runs from: downloaded, compared with its checksum, tried, and only then renamed.

The checksum comes from the same place as the file, so it tells a download that broke from one that did not. That the
place is the right one is told by TLS alone; without it only this machine is asked.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from noid import __version__
from noid.client.errors import ConnectionFailed
from noid.errors import ConfigError, Damaged, InvalidRequest

FILE_NAME = "noid.pyz"
SILENCE_SECS = 30.0
TRIAL_SECS = 30.0
BYTES_MAX = 100 << 20
CHECKSUM_BYTES_MAX = 4096
PIECE_BYTES = 1 << 16


def checked_url(url: str) -> str:
    """Return where the single file is, for the URL of the file or of its directory (which ends with a slash).

    Raises:
        InvalidRequest: it is none, or one that anybody on the way could answer.
    """
    url = url.strip()
    _check_safe(url)
    return f"{url}{FILE_NAME}" if url.endswith("/") else url


def offered_checksum(url: str) -> str:
    """Return the SHA-256, in lowercase hex, of the file at *url*, as the file beside it says.

    Raises:
        ConnectionFailed: it cannot be had.
        Damaged: it is no checksum.
    """
    with _opened(f"{url}.sha256") as reply:
        said = _piece(reply, url, CHECKSUM_BYTES_MAX).decode("ascii", "replace")
    found = re.match(r"\s*([0-9a-fA-F]{64})\b", said)
    if found is None:
        raise Damaged(f"{url}.sha256 does not begin with a SHA-256. Nothing was changed.")
    return found[1].lower()


def checksum_of(path: Path) -> str:
    """Return the SHA-256 of a file, in lowercase hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace(place: Path, url: str, checksum: str) -> str:
    """Put the file at *url*, whose SHA-256 is *checksum*, in the place of the file *place*; return its version.

    It has the old one's mode. Until it is complete, verified and has been run once, the old one is untouched; then it
    is there as a whole, whatever happens.

    Raises:
        ConfigError: nothing can be written there.
        ConnectionFailed: the download broke off.
        Damaged: its checksum is another one, or it does not run here.
    """
    temporary = place.with_name(f".{place.name}-{os.urandom(4).hex()}")
    try:
        with open(temporary, "xb", opener=_owner_only) as file:
            found = _fetch(url, file)
            if found != checksum:
                raise Damaged(
                    f"what {url} sent has not the checksum that is given there: {found} instead of {checksum}. "
                    "Nothing was changed; try again."
                )
            os.fchmod(file.fileno(), place.stat().st_mode & 0o7777)
            file.flush()
            os.fsync(file.fileno())
        version = _version_of(temporary)
        temporary.replace(place)
    except OSError as error:
        raise ConfigError(
            f"cannot write beside {place}: {error.strerror or error}. Nothing was changed. Run this as the file's "
            "owner, perhaps with sudo."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()  # it is there only if something failed
    return version


def _fetch(url: str, file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    size = 0
    with _opened(url) as reply:
        while piece := _piece(reply, url):
            size += len(piece)
            if size > BYTES_MAX:
                raise Damaged(f"{url} is more than {BYTES_MAX >> 20} MiB, which no noid is. Nothing was changed.")
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _piece(reply: Any, url: str, size: int = PIECE_BYTES) -> bytes:
    try:
        return bytes(reply.read(size))
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionFailed(f"the download of {url} broke off: {error}. Nothing was changed; try again.") from error


def _version_of(path: Path) -> str:
    """Return the version that the file at *path* says it is, by running it."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(path), "--version"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
            timeout=TRIAL_SECS,
        )
        said = done.stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise Damaged(f"the downloaded file does not run here: {error}. Nothing was changed.") from error
    if done.returncode != 0 or len(said) < 2 or said[0] != "noid":
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise Damaged(f"the downloaded file is no noid that runs here ({last}). Nothing was changed.")
    return said[1]


class _OnlySafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Follow to where `checked_url` would let us go, too."""
        _check_safe(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    opener = urllib.request.build_opener(_OnlySafeRedirects, urllib.request.ProxyHandler())
    request = urllib.request.Request(url, headers={"User-Agent": f"noid/{__version__}"})  # noqa: S310  # it was checked
    try:
        reply = opener.open(request, timeout=SILENCE_SECS)
    except urllib.error.HTTPError as error:
        error.close()
        raise ConnectionFailed(
            f"{url} cannot be had: the server answered {error.code}. Nothing was changed."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionFailed(f"{url} cannot be had: {reason}. Nothing was changed.") from error
    with reply:
        yield reply


def _check_safe(url: str) -> None:
    from ipaddress import ip_address

    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        raise InvalidRequest(f"{url!r} is not a URL to download noid from.") from None
    try:
        here = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        here = False
    if not host or parts.scheme not in ("http", "https"):
        raise InvalidRequest(
            f"{url!r} is not a URL to download noid from. It looks like https://host/path/{FILE_NAME}."
        )
    if parts.scheme == "http" and not here:
        raise InvalidRequest(f"noid is not downloaded from {url}: without TLS anybody on the way could send another.")


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
