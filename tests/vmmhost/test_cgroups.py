"""Cgroups of VMs: found in whatever is mounted, made with their limits, gone with their VM or at the next start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from noid.vmmhost import cgroups
from noid.vmmhost.cgroups import Cgroups, NoCgroups, mounted
from noid.vmmhost.limits import Limits, Shape, limits_of

LIMITS = limits_of(Shape(cpus=2, mem_mib=100, disk_bytes=0), overhead_mib=28)
MOUNT = "36 25 0:32 {root} {point} rw,relatime shared:9 - {kind} {kind} rw,{options}"


def mount(kind: str, point: str, options: str = "nsdelegate", root: str = "/") -> str:
    return MOUNT.format(kind=kind, point=point, options=options, root=root)


VERSION_1 = [mount("cgroup", f"/cg/{name}", name) for name in ("cpu,cpuacct", "memory", "pids", "freezer")]


def test_limits_are_those_of_the_shape() -> None:
    assert LIMITS.memory_bytes == 128 << 20
    assert (LIMITS.cpu_weight, LIMITS.cpu_quota_us, LIMITS.threads) == (300, 300_000, 130)
    huge = limits_of(Shape(cpus=200, mem_mib=100, disk_bytes=4 << 40), overhead_mib=28)
    assert huge.cpu_weight == 10_000
    assert huge.file_bytes == 9 << 40


def test_version_1_is_a_directory_for_each_controller() -> None:
    own = "5:cpu,cpuacct:/a\n4:memory:/b/c\n3:pids:/\n0::/x\n"
    found = mounted("\n".join(VERSION_1), own)
    assert found.version == 1
    assert found.mounts == {"cpu": Path("/cg/cpu,cpuacct"), "memory": Path("/cg/memory"), "pids": Path("/cg/pids")}
    assert found.own == {"cpu": "/a", "memory": "/b/c", "pids": "/"}


def test_version_2_beside_version_1_counts_only_if_it_has_the_controllers(tmp_path: Path) -> None:
    lines = "\n".join([*VERSION_1, mount("cgroup2", str(tmp_path))])
    own = "4:memory:/b\n0::/user.slice/x\n"
    (tmp_path / "cgroup.controllers").write_text("hugetlb\n")
    assert mounted(lines, own).version == 1
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    found = mounted(lines, own)
    assert (found.version, found.mounts, found.own) == (2, {"": tmp_path}, {"": "/user.slice/x"})


def test_a_mount_that_shows_a_part_of_the_hierarchy_is_counted_from_there() -> None:
    lines = "\n".join(mount("cgroup", f"/cg/{name}", name, root="/pod/7") for name in ("cpu", "memory", "pids"))
    own = "1:cpu:/pod/7\n2:memory:/pod/7/deep\n3:pids:/pod/77\n"
    assert mounted(lines, own).own == {"cpu": "/", "memory": "/deep", "pids": "/pod/77"}


def test_a_missing_controller_is_named() -> None:
    with pytest.raises(NoCgroups, match="no cgroup controller memory, pids is mounted"):
        mounted(VERSION_1[0], "")


@pytest.fixture
def version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of directories that stands in for version 2: each new one has the files a kernel would put there."""
    files = ("cgroup.procs", "cgroup.subtree_control", "memory.max", "cpu.weight", "cpu.max", "pids.max")
    root = tmp_path / "cg"
    made = os.mkdir

    def mkdir(path: Path | str, mode: int = 0o777, **options: object) -> None:
        made(path, mode, **options)  # type: ignore[arg-type]  # as pathlib calls it
        if root in Path(path).parents or Path(path) == root:
            for name in files:
                Path(path, name).touch()

    def rmdir(path: Path | str, **options: object) -> None:
        if Path(path, "cgroup.procs").read_text().strip() or any(entry.is_dir() for entry in Path(path).iterdir()):
            raise OSError(16, "busy")
        for name in (*files, "memory.events"):
            Path(path, name).unlink(missing_ok=True)
        removed(path, **options)  # type: ignore[arg-type]  # as pathlib calls it

    removed = os.rmdir
    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(os, "rmdir", rmdir)
    root.mkdir()
    (root / "cgroup.controllers").write_text("cpu memory pids")
    (tmp_path / "mounts").write_text(mount("cgroup2", str(root)) + "\n")
    (tmp_path / "own").write_text("0::/noid.service/agent\n")
    monkeypatch.setattr(cgroups, "_MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")
    return root


def test_in_version_2_controllers_are_handed_down_and_limits_written(version_2: Path, tmp_path: Path) -> None:
    place = Cgroups.open(tmp_path, Path("/machines.slice"))
    cgroup = place.create("web", LIMITS)

    (directory,) = (version_2 / "machines.slice").glob("noid-*")
    for above in (version_2, version_2 / "machines.slice", directory):
        assert (above / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    files = {path.name: path.read_text() for path in (directory / "web").iterdir()}
    assert files["memory.max"] == str(128 << 20)
    assert (files["cpu.weight"], files["cpu.max"], files["pids.max"]) == ("300", "300000 100000", "130")
    assert [path.name for path in directory.iterdir() if path.is_dir()] == ["web"], "the trial is over"

    (directory / "web" / "memory.events").write_text("oom 1\noom_kill 0\n")
    assert not cgroup.killed_for_memory()
    (directory / "web" / "memory.events").write_text("oom 1\noom_kill 1\n")
    assert cgroup.killed_for_memory()


def test_without_root_version_2_needs_a_place_beside_the_agents(
    version_2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoCgroups, match="DelegateSubgroup=agent"):
        Cgroups.open(tmp_path, None)
    (version_2 / "noid.service").mkdir()
    place = Cgroups.open(tmp_path, None)
    assert list((version_2 / "noid.service").glob("noid-*"))
    place.close()
    assert not list((version_2 / "noid.service").glob("noid-*"))


def test_what_a_killed_agent_left_goes_away_unless_somebody_lives_in_it(version_2: Path, tmp_path: Path) -> None:
    before = Cgroups.open(tmp_path, Path("/m"))
    for name in ("dead", "alive"):
        before.create(name, LIMITS)
    (directory,) = (version_2 / "m").glob("noid-*")
    (directory / "alive" / "cgroup.procs").write_text("7")

    after = Cgroups.open(tmp_path, Path("/m"))

    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == ["alive"]
    after.close()
    assert (directory / "alive").exists()
    (directory / "alive" / "cgroup.procs").write_text("")
    after.close()
    assert not directory.exists()


def test_what_agents_left_that_will_not_come_back_can_be_cleared(version_2: Path, tmp_path: Path) -> None:
    Cgroups.open(tmp_path / "gone", None).create("vm", LIMITS)
    other = Cgroups.open(tmp_path / "other", None)
    other.create("vm", LIMITS)

    cgroups.clear([tmp_path / "gone", tmp_path / "never"])

    assert [path.name for path in version_2.glob("noid-*")] == [cgroups.own_name(tmp_path / "other")]


# --- what this host has ----------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Cgroups]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    try:
        found = Cgroups.open(tmp_path, None)
    except NoCgroups as error:
        pytest.skip(str(error))
    yield found
    found.close()


def test_a_process_is_in_its_cgroup_which_cannot_be_removed_before_it_ends(here: Cgroups) -> None:
    cgroup = here.create("vm", LIMITS)
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            cgroup.enter(process.pid)
            where = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
            assert len([line for line in where if line.endswith("/vm")]) == (3 if here.version == 1 else 1)
            assert not cgroup.remove()
        finally:
            process.kill()
    assert cgroup.remove()
    assert cgroup.remove(), "twice is fine"


def test_a_process_that_takes_more_memory_than_it_may_is_killed_and_that_is_known(here: Cgroups) -> None:
    small = Limits(
        memory_bytes=32 << 20, cpu_weight=100, cpu_quota_us=100_000, threads=8, open_files=64, file_bytes=1 << 20
    )
    cgroup = here.create("vm", small)
    script = "import sys; sys.stdin.read(1); held = bytearray(b'x') * (256 << 20)"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        cgroup.enter(process.pid)
        assert not cgroup.killed_for_memory()
        process.communicate(b"x", timeout=60)
    assert process.returncode == -9
    assert cgroup.killed_for_memory()
    assert cgroup.remove()
    assert not cgroup.killed_for_memory()
