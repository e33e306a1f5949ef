"""A VM's files over HTTP, as rude clients ask for them. The guest is simulated, its end of a copy the real agent's."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from noid.client.copying import Copying
from noid.client.files import GuestPath
from noid.client.settings import Endpoint
from noid.core.plugins import Plugins
from noid.errors import DependencyDown
from noid.server import files as server_files
from noid.testing.faults import Faults
from noid.testing.guest_files import AgentProcess, agent_program, plugins_with_files, until

Server = Any  # see conftest.py
ROUTE = "/v1/vms/web/files"
TAR = "application/x-tar"
PATIENCE_SECS = 20.0


def children(agent: AgentProcess) -> list[str]:
    return Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()


@pytest.fixture
def agents() -> list[AgentProcess]:
    """The agents that run now."""
    return []


@pytest.fixture
def plugins_of(tmp_path_factory: pytest.TempPathFactory, agents: list[AgentProcess]) -> Callable[[Faults], Plugins]:
    """Replaces the one of conftest.py."""
    try:
        program = agent_program(tmp_path_factory.mktemp("agent"))
    except DependencyDown as error:
        pytest.skip(f"no guest agent: {error}")
    return partial(plugins_with_files, program=program, agents=agents)


def at(path: Path | str, **words: object) -> str:
    return f"{ROUTE}?path={path}" + "".join(f"&{key}={value}" for key, value in words.items())


def digest(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def tar_of(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


# --- reading ---------------------------------------------------------------------------------------------------------


async def test_a_file_is_its_bytes_and_head_and_json_say_what_it_is(web: Server, tmp_path: Path) -> None:
    file, data = tmp_path / "file", os.urandom(300_000)
    file.write_bytes(data)
    file.chmod(0o640)
    got = await web.ask("GET", at(file))
    assert (got.status, got.body, got.headers["accept-ranges"]) == (200, data, "bytes")
    about = json.loads(got.headers["x-noid-file"])
    assert (about["kind"], about["size"], about["mode"]) == ("file", 300_000, "0640")
    assert about["mtime_ns"] == file.stat().st_mtime_ns
    head = await web.ask("HEAD", at(file, sum=1))
    assert (head.status, head.body, head.headers["etag"]) == (200, b"", got.headers["etag"])
    assert head.headers["repr-digest"] == digest(data)
    said = (await web.ask("GET", at(file, sum=1, length=1000), headers={"accept": "application/json"})).json()
    assert said == about | {"sha256": hashlib.sha256(data[:1000]).hexdigest()}
    missing = await web.ask("GET", at(tmp_path / "nothing"), headers={"accept": "application/json"})
    assert (missing.status, missing.json()) == (200, {"kind": "missing"})
    assert (await web.ask("HEAD", at(tmp_path / "nothing"))).status == 404


RANGES = [
    ("bytes=0-0", 206, 0, 1),
    ("bytes=5-", 206, 5, 1000),
    ("bytes=-7", 206, 993, 1000),
    ("bytes=-5000", 206, 0, 1000),
    ("bytes=990-5000", 206, 990, 1000),
    ("bytes=7-3", 200, 0, 1000),  # RFC 9110, 14.1.1: invalid, so ignored
    ("bytes=1-2,5-6", 200, 0, 1000),
    ("lines=1-2", 200, 0, 1000),
    ("bytes=-", 200, 0, 1000),
    ("bytes=1000-", 416, 0, 0),
    ("bytes=99999999999999999-", 416, 0, 0),
    ("bytes=-0", 416, 0, 0),
]


async def test_a_range_is_that_part(web: Server, tmp_path: Path) -> None:
    data = os.urandom(1000)
    (tmp_path / "file").write_bytes(data)
    for wanted, status, begin, end in RANGES:
        got = await web.ask("GET", at(tmp_path / "file"), headers={"range": wanted})
        assert got.status == status, wanted
        if status == 416:
            assert got.headers["content-range"] == "bytes */1000"
            assert got.json()["code"] == "invalid"
            continue
        assert got.body == data[begin:end], wanted
        assert got.headers.get("content-range") == (f"bytes {begin}-{end - 1}/1000" if status == 206 else None), wanted


async def test_if_range_gives_a_part_of_the_same_file_and_all_of_another(web: Server, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    tag = (await web.ask("HEAD", at(file))).headers["etag"]
    part = {"range": "bytes=4-", "if-range": tag}
    got = await web.ask("GET", at(file), headers=part)
    assert (got.status, got.body) == (206, b"456789")
    file.write_bytes(b"abcdefghijk")
    got = await web.ask("GET", at(file), headers=part)
    assert (got.status, got.body) == (200, b"abcdefghijk")


async def test_a_directory_is_a_tar_and_a_file_is_one_where_it_is_asked_for(web: Server, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("text")
    for path, accept, name in ((tmp_path / "tree", "*/*", "./file"), (tmp_path / "tree" / "file", TAR, "file")):
        got = await web.ask("GET", at(path), headers={"accept": accept})
        assert (got.status, got.headers["content-type"]) == (200, TAR)
        with tarfile.open(fileobj=io.BytesIO(got.body)) as archive:
            names = {os.path.normpath(member.name): member for member in archive.getmembers()}
            content = archive.extractfile(names[os.path.normpath(name)])
            assert content is not None
            assert content.read() == b"text"


async def test_a_client_that_leaves_in_the_middle_ends_the_guests_end_and_nothing_else(
    web: Server, agents: list[AgentProcess], tmp_path: Path
) -> None:
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(1 << 40)
    client = await web.unix()
    await client.send("GET", at(tmp_path / "endless"))
    assert await client.stream.receive_some(65536)
    assert any(children(agent) for agent in agents)
    await client.stream.aclose()
    (tmp_path / "file").write_text("still there")
    with trio.fail_after(PATIENCE_SECS):
        assert (await web.ask("GET", at(tmp_path / "file"))).body == b"still there"
        await until(lambda: not any(children(agent) for agent in agents))


async def test_a_download_that_fails_in_its_middle_ends_without_its_end(web: Server, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as content:
        content.truncate(64 << 20)
    client = await web.unix()
    await client.send("GET", at(file))
    received = len(await client.stream.receive_some(65536))
    os.truncate(file, 1 << 20)
    with trio.fail_after(PATIENCE_SECS):
        received += len(await client.until_closed())
    assert received < 64 << 20


# --- refusals --------------------------------------------------------------------------------------------------------


REFUSALS = [
    ("GET", ROUTE, 400, "invalid"),
    ("GET", f"{ROUTE}?path=a%00b", 400, "invalid"),
    ("GET", f"{ROUTE}?path={'x' * 4096}", 400, "invalid"),
    ("GET", f"{ROUTE}?path=/nothing/there", 404, "not_found"),
    ("GET", "/v1/vms/other/files?path=/etc", 404, "not_found"),
    ("GET", f"{ROUTE}?path=/dev/null", 409, "conflict"),
    ("GET", f"{ROUTE}?path=/etc/passwd&user=nobody-here", 400, "invalid"),
    ("PUT", f"{ROUTE}?path=/etc", 409, "conflict"),
    ("PUT", f"{ROUTE}?path=/nothing/there", 404, "not_found"),
    ("PUT", f"{ROUTE}?path=/tmp/x&mode=9", 400, "invalid"),
    ("PUT", f"{ROUTE}?path=/tmp/x&mode=17777", 400, "invalid"),
    ("PUT", f"{ROUTE}?path=/tmp/x&offset=-1", 400, "invalid"),
    ("PUT", f"{ROUTE}?path=/tmp/x&offset=1", 400, "invalid"),
    ("PUT", "/v1/vms/other/files?path=/etc", 404, "not_found"),
    ("PUT", "/v1/vms/..%2fweb/files?path=/etc", 404, "not_found"),
    ("POST", f"{ROUTE}?path=/tmp/x", 404, "not_found"),
    ("DELETE", f"{ROUTE}?path=/tmp/x", 404, "not_found"),
]


@pytest.mark.parametrize("size", [0, 8 << 20])
async def test_what_cannot_be_is_refused_in_words_also_with_a_large_body_nobody_reads(web: Server, size: int) -> None:
    for method, path, status, code in REFUSALS:
        if size == 0 or method != "GET":
            await refused(web, method, path, size, (status, code))
    assert (await web.ask("GET", "/v1/vms")).status == 200


async def refused(web: Server, method: str, path: str, size: int, expected: tuple[int, str]) -> None:
    client = await web.unix()
    with trio.fail_after(PATIENCE_SECS):
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await client.send(method, path, bytes(size))

            nursery.start_soon(send)
            answer = await client.receive(method)
            nursery.cancel_scope.cancel()
    assert (answer.status, answer.json()["code"]) == expected, (method, path, answer.body)
    await client.stream.aclose()


async def test_who_may_not_is_refused(web: Server, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "file").write_text("secret")
    assert (await web.refused("GET", at(tmp_path / "file", user="nobody")))[:2] == (403, "denied")
    token = await web.add_user("mallory")
    assert (await web.refused("GET", at("/etc/passwd"), token=token))[0] == 404
    assert (await web.refused("GET", at("/etc/passwd"), token="no-token"))[0] == 401


# --- writing ---------------------------------------------------------------------------------------------------------


async def test_a_file_appears_with_its_mode_and_time_and_what_was_sent_is_what_is_there(
    web: Server, tmp_path: Path
) -> None:
    data = os.urandom(3_000_000)
    words = {"mode": "751", "mtime_ns": -1_500_000_000}
    answer = await web.ask("PUT", at(tmp_path / "file", **words), data, headers={"repr-digest": digest(data)})
    assert answer.status == 200
    assert answer.json() == {
        "size": len(data),
        "entries": 1,
        "sha256": hashlib.sha256(data).hexdigest(),
        "left_out": [],
    }
    status = (tmp_path / "file").stat()
    assert ((tmp_path / "file").read_bytes(), status.st_mode & 0o7777) == (data, 0o751)
    assert status.st_mtime_ns == -1_500_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


async def test_what_is_not_what_was_announced_stays_a_part_and_a_part_can_be_gone_on_with(
    web: Server, tmp_path: Path
) -> None:
    target, data = tmp_path / "file", os.urandom(200_000)
    target.write_text("old")
    refusal = await web.ask("PUT", at(target), data[:100_000], headers={"repr-digest": digest(data)})
    assert (refusal.status, refusal.json()["code"]) == (400, "invalid")
    assert "SHA-256" in refusal.json()["error"]
    assert target.read_text() == "old"
    part = (tmp_path / "file.noid-part").read_bytes()  # as much of it as the guest had taken
    assert part == data[: len(part)]

    beyond = await web.ask("PUT", at(target, offset=150_000), data[150_000:], headers={"repr-digest": digest(data)})
    assert (beyond.status, beyond.json()["code"]) == (409, "conflict")

    have = len(part)
    rest = await web.ask("PUT", at(target, offset=have), data[have:], headers={"repr-digest": digest(data)})
    assert (rest.status, rest.json()["sha256"]) == (200, hashlib.sha256(data).hexdigest())
    assert target.read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


async def test_an_upload_that_is_cut_leaves_the_file_as_it_was_and_a_part(web: Server, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    client = await web.unix()
    await client.send("PUT", at(target), b"x" * 100_000, headers={"content-length": "5000000"})
    part = tmp_path / "file.noid-part"
    with trio.fail_after(PATIENCE_SECS):
        await until(lambda: part.exists() and part.stat().st_size >= 100_000)
        await client.stream.aclose()
        answer = await web.ask("PUT", at(tmp_path / "other"), b"new")
    assert answer.status == 200
    assert target.read_text() == "old"
    assert part.read_bytes() == b"x" * 100_000


async def test_an_upload_that_falls_silent_ends_and_one_that_dribbles_arrives(
    web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_files, "BODY_SILENCE_SECS", 0.5)
    slow, silent = await web.unix(), await web.unix()
    await silent.send("PUT", at(tmp_path / "silent"), b"x", headers={"content-length": "10"})
    await slow.send("PUT", at(tmp_path / "slow"), b"x", headers={"content-length": "10"})
    for _ in range(9):
        await trio.sleep(0.1)
        await slow.stream.send_all(b"y")
    assert (await slow.receive("PUT")).status == 200
    assert (tmp_path / "slow").read_bytes() == b"xyyyyyyyyy"
    answer = await silent.receive("PUT")
    assert (answer.status, answer.json()["code"]) == (504, "deadline")


async def test_a_tree_goes_in_as_a_tar_and_what_leads_out_of_it_does_not(web: Server, tmp_path: Path) -> None:
    stream = tar_of(("in/side", b"good"), ("../outside", b"bad"), ("/tmp/noid-absolute", b"bad"), ("last", b"good"))
    answer = await web.ask("PUT", at(tmp_path / "tree"), stream, headers={"content-type": TAR})
    assert answer.status == 200
    assert (answer.json()["entries"], len(answer.json()["left_out"])) == (2, 2)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "last", "side", "tree"]
    assert not Path("/tmp/noid-absolute").exists()
    broken = await web.ask("PUT", at(tmp_path / "tree"), stream[:700], headers={"content-type": TAR})
    assert (broken.status, broken.json()["code"]) == (400, "invalid")


async def test_the_client_s_trees_arrive_whatever_the_sizes_of_their_files_are(web: Server, tmp_path: Path) -> None:
    here, there, back = tmp_path / "here", tmp_path / "there", tmp_path / "back"
    here.mkdir()
    contents = {f"{size:06}": os.urandom(size) for size in (0, 1, 511, 512, 513, 1024, 262_144, 262_145)}
    for name, content in contents.items():
        (here / name).write_bytes(content)
    endpoint, guest = Endpoint(socket_path=web.config.socket_path), GuestPath(vm="web", path=str(there))
    with trio.fail_after(PATIENCE_SECS):
        into, out = Copying(endpoint=endpoint), Copying(endpoint=endpoint)
        await trio.to_thread.run_sync(into.into_guest, str(here), guest)
        await trio.to_thread.run_sync(out.out_of_guest, guest, str(back))
    for place in (there, back):
        assert {path.name: path.read_bytes() for path in place.iterdir()} == contents
    assert into.done.left_out == out.done.left_out == []
