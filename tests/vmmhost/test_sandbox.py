"""The sandbox as a whole: what is in force is what is said, and what is demanded and not to be had is no agent."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from noid.core.config.settings import SandboxConfig
from noid.core.model.sandbox import DEFAULT_UIDS, SandboxMode, SandboxSettings
from noid.errors import BackendError, ConfigError
from noid.vmmhost import sandbox as module
from noid.vmmhost.cgroups import Cgroup, Cgroups, NoCgroups
from noid.vmmhost.enclosure import Enclosure, Room
from noid.vmmhost.identities import Identities
from noid.vmmhost.launcher import LAUNCHER
from noid.vmmhost.limits import Shape
from noid.vmmhost.process import VmmProcess
from noid.vmmhost.sandbox import opened
from noid.vmmhost.sockets import socket_itself

SHAPE = Shape(cpus=1, mem_mib=64, disk_bytes=1 << 20)

pytestmark = pytest.mark.skipif(not LAUNCHER.is_file(), reason=f"{LAUNCHER.name} is not built")


def no_cgroups(*_: object) -> Cgroups:
    raise NoCgroups("none is delegated")


async def test_without_root_and_cgroups_auto_keeps_what_is_left_and_says_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(Cgroups, "open", no_cgroups)
    with caplog.at_level(logging.INFO):
        async with opened(SandboxSettings(mode=SandboxMode.AUTO), tmp_path, tmp_path) as sandbox:
            assert sandbox.mode is SandboxMode.LIMITS
            argv = sandbox.enclose("vm", tmp_path, SHAPE).command(["/bin/true"], Room())
    assert argv[0] == str(LAUNCHER)
    assert "--room" not in argv
    (record,) = [record for record in caplog.records if record.name == module.log.name]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "sandbox limits: rlimits, no new privileges; no user and no root directory of their own: the agent is not "
        "root; no limits of memory, CPU and threads: none is delegated"
    )


@pytest.mark.parametrize(
    ("mode", "words"), [("full", "the agent is not root"), ("limits", "none is delegated.*Name a cgroup")]
)
async def test_what_is_demanded_and_cannot_be_had_is_no_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(Cgroups, "open", no_cgroups)
    with pytest.raises(ConfigError, match=words):
        async with opened(SandboxSettings(mode=SandboxMode(mode)), tmp_path, tmp_path):
            pass


async def test_an_installation_without_its_launcher_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAUNCHER", tmp_path / "noid-launcher-z80")
    async with opened(SandboxSettings(mode=SandboxMode.AUTO), tmp_path, tmp_path) as sandbox:
        assert sandbox.mode is SandboxMode.OFF
        assert "has no noid-launcher-z80" in sandbox.lacks[0]
    with pytest.raises(ConfigError, match="has no noid-launcher-z80"):
        async with opened(SandboxSettings(mode=SandboxMode.LIMITS), tmp_path, tmp_path):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_a_process_is_adopted_with_its_user_by_an_agent_that_gives_none(tmp_path: Path) -> None:
    async with opened(SandboxSettings(mode=SandboxMode.FULL), tmp_path, tmp_path) as sandbox:
        (directory := tmp_path / "vm").mkdir()
        disk, shared = directory / "disk", directory / "memory"
        disk.write_bytes(b"")
        shared.write_bytes(b"")
        async with sandbox.enclosed("vm", directory, SHAPE, own=[disk], shared=[shared]) as enclosure:
            room = Room(read=tuple(map(Path, ("/usr", "/lib", "/lib64", "/bin"))), write=(directory,))
            process = VmmProcess.spawn(
                enclosure.command(["/usr/bin/sleep", "1000"], room),
                environment={},
                log_path=directory / "log",
                pass_fds=(),
            )
            enclosure.enter(process.ref.pid)
            await enclosure.entered()
        uid, gid = map(int, enclosure.user.split(":"))
        assert (disk.stat().st_uid, shared.stat().st_uid, shared.stat().st_gid) == (uid, os.geteuid(), gid)
        assert stat.S_IMODE(shared.stat().st_mode) & 0o077 == 0o040

        while "sleep" not in Path(f"/proc/{process.ref.pid}/cmdline").read_text().partition("\0")[0]:
            pass  # the launcher still is
        async with opened(SandboxSettings(mode=SandboxMode.OFF), tmp_path, tmp_path) as other:
            adopted = other.adopt("vm", directory, process.ref.pid)
            assert adopted.user == enclosure.user
            with adopted.outgoing(process.ref.pid) as out:
                inside = Path(f"/proc/{process.ref.pid}/root", str(out.path).lstrip("/"))
                assert inside.stat().st_uid == uid
                os.write(out.fd, b"state")
                out.keep(tmp_path / "state")
            assert (tmp_path / "state").read_bytes() == b"state"
            assert (tmp_path / "state").stat().st_uid == os.geteuid()
            assert not inside.exists()
        process.send_kill()
        await process.wait()
        process.close()
        assert enclosure.why_ended() == ""
        await enclosure.release()
        await enclosure.release()


class Refusing(Cgroup):
    def __init__(self) -> None:
        super().__init__({})

    def enter(self, pid: int) -> None:
        raise PermissionError(1, f"not {pid}")


async def test_a_process_that_cannot_have_its_limits_is_ended_and_says_why(tmp_path: Path) -> None:
    process = VmmProcess.spawn(["sleep", "1000"], environment={}, log_path=tmp_path / "log", pass_fds=())
    enclosure = Enclosure(directory=tmp_path, cgroup=Refusing())
    enclosure.enter(process.ref.pid)
    await process.wait()
    process.close()
    assert process.exit_signal == 9
    await enclosure.release()
    assert "could not be moved into its cgroup" in enclosure.why_ended()


def test_user_ids_are_given_once_until_they_are_given_back() -> None:
    identities = Identities(range(100, 104), taken={102})
    assert {identities.take(), identities.take()} == {101, 103}
    with pytest.raises(BackendError, match=r"all 3 user ids of \[sandbox\] uids are in use"):
        identities.take()
    identities.release(102)
    assert identities.take() == 102


def test_a_link_in_a_sockets_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/log")
    with pytest.raises(OSError, match="link"), socket_itself(tmp_path / "link"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ConnectionRefusedError), socket_itself(tmp_path / "file"):
        pass


def test_what_is_written_in_server_toml_is_read_once() -> None:
    assert SandboxConfig().settings().uids == DEFAULT_UIDS
    settings = SandboxConfig(mode="full", uids="5-9", cgroup="/vms", readable=("/nix/store",)).settings()
    assert (settings.uids, settings.cgroup, settings.readable) == (range(5, 10), Path("/vms"), (Path("/nix/store"),))


@pytest.mark.parametrize("uids", ["0-9", "9-5", "5-5", "5", "5-99999999999", "a-b", "1-4294967295"])
def test_a_range_that_is_none_is_refused(uids: str) -> None:
    with pytest.raises(ConfigError, match="FIRST-LAST"):
        SandboxConfig(uids=uids).settings()


@pytest.mark.parametrize("path", ["relative", "/a/../b"])
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="not an absolute path"):
        SandboxConfig(cgroup=path).settings()
