"""A single file is replaced by what was verified and has run, or not at all."""

from __future__ import annotations

import hashlib
import http.server
import io
import stat
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from noid.client import selfupdate
from noid.errors import ConfigError, Damaged, InvalidRequest, NoidError


def program(text: str) -> bytes:
    """A file that Python runs."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("__main__.py", text)
    return b"#!/usr/bin/env python3\n" + content.getvalue()


NEW = program("print('noid 9.9.9 (single file)')")


class Shop:
    """A server with files; of one of them it sends only the first *cut* bytes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.cut: int | None = None
        shop = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path in shop.moved:
                    self.send_response(302)
                    self.send_header("Location", shop.moved[self.path])
                    self.end_headers()
                    return
                content = shop.files.get(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write((content or b"")[: shop.cut if self.path.endswith(".pyz") else None])

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/noid.pyz"

    def sells(self, content: bytes, checksum: str | None = None) -> None:
        self.files["/noid.pyz"] = content
        self.files["/noid.pyz.sha256"] = f"{checksum or hashlib.sha256(content).hexdigest()}  noid.pyz\n".encode()


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    thread = threading.Thread(target=shop.server.serve_forever, args=(0.02,))
    thread.start()
    yield shop
    shop.server.shutdown()
    thread.join(20)
    shop.server.server_close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "bin" / "noid"
    place.parent.mkdir()
    place.write_bytes(b"the old one")
    place.chmod(0o751)
    return place


def untouched(place: Path) -> bool:
    return [entry.name for entry in place.parent.iterdir()] == [place.name] and place.read_bytes() == b"the old one"


def test_the_new_one_takes_the_old_one_s_place_and_mode(shop: Shop, place: Path) -> None:
    shop.sells(NEW)
    checksum = selfupdate.offered_checksum(shop.url)
    assert selfupdate.replace(place, shop.url, checksum) == "9.9.9"
    assert place.read_bytes() == NEW
    assert stat.S_IMODE(place.stat().st_mode) == 0o751
    assert [entry.name for entry in place.parent.iterdir()] == [place.name]
    assert selfupdate.checksum_of(place) == checksum


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (program("import nothing_of_that_name"), "No module named 'nothing_of_that_name'"),
        (program("print('something else')"), "no noid that runs here"),
        (b"not a program", "no noid that runs here"),
        (b"", "no noid that runs here"),
    ],
)
def test_what_does_not_run_here_is_not_installed(shop: Shop, place: Path, content: bytes, said: str) -> None:
    shop.sells(content)
    with pytest.raises(Damaged, match=said):
        selfupdate.replace(place, shop.url, selfupdate.offered_checksum(shop.url))
    assert untouched(place)


def test_another_checksum_than_was_promised_changes_nothing(shop: Shop, place: Path) -> None:
    shop.sells(NEW, checksum="ab" * 32)
    with pytest.raises(Damaged, match="has not the checksum that is given there"):
        selfupdate.replace(place, shop.url, selfupdate.offered_checksum(shop.url))
    assert untouched(place)


def test_a_download_that_breaks_off_changes_nothing(shop: Shop, place: Path) -> None:
    shop.sells(NEW)
    shop.cut = 100
    with pytest.raises(NoidError, match="Nothing was changed; try again"):
        selfupdate.replace(place, shop.url, selfupdate.offered_checksum(shop.url))
    assert untouched(place)


@pytest.mark.parametrize("checksum", ["", "abc", "<html>not found</html>", "g" * 64, "a" * 65])
def test_what_is_no_checksum_ends_it_before_the_download(shop: Shop, checksum: str) -> None:
    shop.files["/noid.pyz.sha256"] = checksum.encode()
    with pytest.raises(Damaged, match="does not begin with a SHA-256"):
        selfupdate.offered_checksum(shop.url)


def test_a_file_that_is_not_there_is_said_with_the_server_s_status(shop: Shop) -> None:
    with pytest.raises(NoidError, match=r"noid\.pyz\.sha256 cannot be had: the server answered 404"):
        selfupdate.offered_checksum(shop.url)


def test_nobody_there_is_one_line(place: Path) -> None:
    with pytest.raises(NoidError, match="Connection refused"):
        selfupdate.offered_checksum("http://127.0.0.1:9/noid.pyz")


def test_a_directory_that_cannot_be_written_is_said_before_anything_is_downloaded(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Run this as the file's owner"):
        selfupdate.replace(tmp_path / "not there" / "noid", shop.url, "ab" * 32)


@pytest.mark.parametrize(
    "url", ["http://example.org/noid.pyz", "ftp://x/noid.pyz", "noid.pyz", "http://[::1", "https://"]
)
def test_it_is_downloaded_from_nowhere_that_anybody_could_answer_for(url: str) -> None:
    with pytest.raises(InvalidRequest):
        selfupdate.checked_url(url)


def test_a_redirect_leads_to_no_worse_place(shop: Shop) -> None:
    shop.moved["/noid.pyz.sha256"] = "http://example.org/noid.pyz.sha256"
    with pytest.raises(InvalidRequest, match="without TLS"):
        selfupdate.offered_checksum(shop.url)
    shop.sells(NEW)
    shop.moved["/noid.pyz.sha256"] = "/elsewhere"
    shop.files["/elsewhere"] = shop.files["/noid.pyz.sha256"]
    assert selfupdate.offered_checksum(shop.url) == hashlib.sha256(NEW).hexdigest()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("https://host/dist/", "https://host/dist/noid.pyz"),
        (" https://host/n.pyz", "https://host/n.pyz"),
        ("http://localhost:8000/noid.pyz", "http://localhost:8000/noid.pyz"),
        ("http://[::1]/noid.pyz", "http://[::1]/noid.pyz"),
    ],
)
def test_a_url_is_that_of_the_file_or_of_its_directory(given: str, meant: str) -> None:
    assert selfupdate.checked_url(given) == meant
