"""What builds guests: the cache, the host's programs and apt, and file systems made without privileges."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from noid.core.guestbuild import aptsources, cache, debs, ext4, programs, rootfs
from noid.core.guestbuild.furnish import furnish
from noid.core.guestbuild.rootfs import debian_rootfs
from noid.errors import BackendError, DependencyDown, InvalidRequest, NoSpace


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "noid"


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which a test puts programs that are found before the host's."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return place


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# --- cache --------------------------------------------------------------------------------------------------------


def test_what_is_in_the_cache_is_not_built_again(cache_home: Path) -> None:
    builds: list[Path] = []

    def build(place: Path) -> None:
        builds.append(place)
        (place / "thing").write_text("made")

    first = cache.cached("things", "key", build)
    second = cache.cached("things", "key", build)

    assert first == second == cache_home / "things" / "key"
    assert (first / "thing").read_text() == "made"
    assert len(builds) == 1
    assert not builds[0].exists()


def test_two_that_want_the_same_thing_build_it_once(cache_home: Path) -> None:
    builds: list[Path] = []
    begun = threading.Event()
    go = threading.Event()

    def build(place: Path) -> None:
        builds.append(place)
        begun.set()
        assert go.wait(10)

    threads = [threading.Thread(target=cache.cached, args=("things", "key", build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    go.set()
    for thread in threads:
        thread.join()

    assert len(builds) == 1
    assert (cache_home / "things" / "key").is_dir()


def test_a_build_that_fails_or_was_killed_leaves_nothing_that_counts(cache_home: Path) -> None:
    shelf = cache_home / "things"
    (shelf / ".key.killed.partial").mkdir(parents=True)

    def build(place: Path) -> None:
        (place / "half").write_text("half")
        raise OSError(28, "No space left on device", str(place / "half"))

    with pytest.raises(NoSpace, match="writing to the cache"):
        cache.cached("things", "key", build)

    assert [path.name for path in shelf.iterdir()] == [".key.lock"]


# --- programs -----------------------------------------------------------------------------------------------------


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "_SYSTEM_DIRECTORIES", ())
    with pytest.raises(DependencyDown, match=r"making a disk needs the program mke2fs.*apt-get install e2fsprogs"):
        programs.run(["mke2fs"], "making a disk")


def test_a_failing_program_is_quoted_where_it_complains(bin_dir: Path) -> None:
    script(bin_dir / "tool", "echo noise >&2; echo 'E: no such thing' >&2; echo more noise >&2; exit 3")
    with pytest.raises(BackendError) as failed:
        programs.run(["tool"], "using the tool")
    assert str(failed.value) == "using the tool failed: tool exited with 3: E: no such thing."


def test_ordinary_users_find_the_administrators_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert programs.search_path().split(os.pathsep) == ["/usr/bin", "/usr/local/sbin", "/usr/sbin", "/sbin"]


# --- apt ----------------------------------------------------------------------------------------------------------


def indextargets(*lines: str) -> str:
    return "cat <<'END'\n" + "\n".join(lines) + "\nEND"


def test_only_the_distributions_own_archives_go_into_a_guest(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aptsources, "codename", lambda: "bookworm")
    script(
        bin_dir / "apt-get",
        indextargets(
            "Packages|Debian|bookworm|stable|http://mirror/debian/|main",
            "Packages|Debian|bookworm|stable|http://mirror/debian/|contrib",
            "DEP-11|Debian|bookworm|stable|http://mirror/debian/|main",
            "Packages|Debian|bookworm-security|bookworm-security|http://mirror/security/|main",
            "Packages|Debian Backports|bookworm-backports|bookworm-backports|http://mirror/debian/|main",
            "Packages|Debian|bookworm-backports|bookworm-backports|http://mirror/debian/|main",
            "Packages|Docker|bookworm|bookworm|https://docker/|stable",
            "Packages|Debian|trixie|trixie|http://mirror/debian/|main",
        ),
    )
    assert [source.line() for source in aptsources.distribution_sources("bookworm")] == [
        "deb http://mirror/debian/ bookworm main contrib",
        "deb http://mirror/security/ bookworm-security main",
    ]
    assert [source.suite for source in aptsources.distribution_sources("trixie")] == ["trixie", "trixie-security"]


def test_ubuntus_branches_are_told_apart_by_their_suites(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aptsources, "codename", lambda: "noble")
    script(
        bin_dir / "apt-get",
        indextargets(
            "Packages|Ubuntu|noble|noble|http://archive/|main",
            "Packages|Ubuntu|noble|noble-updates|http://archive/|main",
            "Packages|Ubuntu|noble|noble-backports|http://archive/|main",
        ),
    )
    assert [source.suite for source in aptsources.distribution_sources("noble")] == ["noble", "noble-updates"]


def test_without_package_lists_the_way_to_get_them_is_told(bin_dir: Path) -> None:
    script(bin_dir / "apt-get", "exit 0")
    script(bin_dir / "apt-cache", "exit 0")
    with pytest.raises(DependencyDown, match="apt-get update"):
        aptsources.distribution_sources("bookworm")
    with pytest.raises(DependencyDown, match=r"apt knows no package busybox-static\. Run 'apt-get update'"):
        debs.candidate("busybox-static")


def test_a_proxy_on_the_host_itself_is_of_no_use_to_a_guest(bin_dir: Path) -> None:
    script(
        bin_dir / "apt-config",
        "cat <<'END'\n"
        'Acquire::http::Proxy "http://127.0.0.1:3142";\n'
        'Acquire::https::Proxy "http://proxy.example:3128";\n'
        'Acquire::https::CaInfo "/etc/ssl/own.pem";\n'
        'Acquire::Check-Date "false";\n'
        'APT::Architecture "amd64";\n'
        "END",
    )
    assert len(aptsources.options(for_guest=False)) == 4
    assert aptsources.options(for_guest=True) == [
        'Acquire::https::Proxy "http://proxy.example:3128";',
        'Acquire::Check-Date "false";',
    ]


def test_of_alternative_dependencies_the_first_is_taken(bin_dir: Path) -> None:
    script(
        bin_dir / "apt-cache",
        "cat <<'END'\nPackage: linux-image-x\nVersion: 1:2.3-4\nArchitecture: amd64\n"
        "Depends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120) | linux-initramfs-tool\nEND\nexit 100",
    )
    package = debs.candidate("linux-image-x")
    assert (package.version, package.depends) == ("1:2.3-4", ("kmod", "linux-base", "initramfs-tools"))


# --- file systems -------------------------------------------------------------------------------------------------


def owner(image: Path, path: str) -> tuple[int, int]:
    """Return the user and group id of *path* inside *image*."""
    said = subprocess.run(
        [str(programs.find("debugfs")), "-R", f"stat {path}", str(image)], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"User:\s*(\d+)\s+Group:\s*(\d+)", said)
    assert match, said
    return int(match[1]), int(match[2])


@pytest.mark.skipif(programs.find("debugfs") is None, reason="debugfs is missing (apt-get install e2fsprogs)")
def test_files_in_a_file_system_belong_to_whom_they_should(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "home" / "noid").mkdir(parents=True)
    (tree / "home" / "noid" / "a file").write_text("x")
    (tree / "unit\\x2dname").write_text("x")
    (tree / "link").symlink_to("/nowhere")
    if os.geteuid() == 0:
        os.chown(tree / "link", 7, 7, follow_symlinks=False)  # as if somebody else had made the tree

    ext4.make(tree, tmp_path / "disk", 8 << 20, {"home/noid": (1000, 1000), "home/noid/a file": (1000, 50)})

    assert owner(tmp_path / "disk", "/") == (0, 0)
    assert owner(tmp_path / "disk", "/home/noid") == (1000, 1000)
    assert owner(tmp_path / "disk", '"/home/noid/a file"') == (1000, 50)
    assert owner(tmp_path / "disk", "/unit\\x2dname") == (0, 0)
    assert owner(tmp_path / "disk", "/link") == (0, 0)
    ext4.check(tmp_path / "disk")


@pytest.mark.skipif(programs.find("debugfs") is None, reason="debugfs is missing (apt-get install e2fsprogs)")
def test_programs_keep_their_capabilities(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "ping").write_text("x")
    raw = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep

    ext4.make(tmp_path / "tree", tmp_path / "disk", 8 << 20, {}, {"ping": raw})

    argv = [str(programs.find("debugfs")), "-R", "ea_get -x /ping security.capability", str(tmp_path / "disk")]
    assert bytes.fromhex(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split("=")[1]) == raw
    with pytest.raises(BackendError, match=r"setting capabilities failed: debugfs .*nowhere"):
        ext4.make(tmp_path / "tree", tmp_path / "disk", 8 << 20, {}, {"nowhere": raw})


def test_a_tree_that_does_not_fit_is_an_error_in_mke2fs_own_words(tmp_path: Path) -> None:
    if programs.find("mke2fs") is None:
        pytest.skip("mke2fs is missing (apt-get install e2fsprogs)")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "big").write_bytes(os.urandom(6 << 20))
    with pytest.raises(BackendError, match=r"making the file system failed: mke2fs exited with 1: .*allocate"):
        ext4.make(tmp_path / "tree", tmp_path / "disk", 4 << 20)


# --- the default guest --------------------------------------------------------------------------------------------


def bare_tree(place: Path) -> Path:
    """Return the parts of a fresh Debian that `furnish` looks at."""
    for name in ("etc/skel", "etc/systemd/system", "etc/apt/sources.list.d", "etc/ssh", "home", "run", "var/lib/dbus"):
        (place / name).mkdir(parents=True)
    for name, text in (
        ("etc/passwd", "root:x:0:0:root:/root:/bin/bash\n"),
        ("etc/group", "root:x:0:\n"),
        ("etc/shadow", "root:*:19000:0:99999:7:::\n"),
        ("etc/gshadow", "root:*::\n"),
        ("etc/skel/.bashrc", "# bash\n"),
        ("etc/inputrc", "set bell-style none\n"),
        ("etc/ssh/ssh_host_rsa_key", "secret"),
        ("etc/machine-id", "1234\n"),
        ("var/lib/dbus/machine-id", "1234\n"),
    ):
        (place / name).write_text(text)
    (place / "etc/shadow").chmod(0o640)
    (place / "etc/resolv.conf").symlink_to("/etc/hostname")
    return place


def test_a_furnished_guest_has_a_user_a_console_and_no_identity(tmp_path: Path) -> None:
    tree = bare_tree(tmp_path / "tree")

    owners = furnish(tree, [aptsources.Source(uri="http://mirror/", suite="bookworm", components=("main",))], ["A;"])

    assert owners == dict.fromkeys(["home/noid", "home/noid/.bashrc", "home/noid/.hushlogin"], (1000, 1000))
    assert "noid:x:1000:1000:noid:/home/noid:/bin/bash" in (tree / "etc/passwd").read_text()
    assert stat.S_IMODE((tree / "etc/shadow").stat().st_mode) == 0o640
    assert stat.S_IMODE((tree / "etc/sudoers.d/noid").stat().st_mode) == 0o440
    assert (tree / "etc/machine-id").read_text() == ""
    assert not (tree / "var/lib/dbus/machine-id").exists()
    assert list((tree / "etc/ssh").iterdir()) == []
    assert (tree / "etc/apt/sources.list").read_text() == "deb http://mirror/ bookworm main\n"
    assert (tree / "etc/apt/apt.conf.d/80noid-host").read_text() == "A;\n"
    assert "enable-bracketed-paste off" in (tree / "etc/inputrc").read_text()
    assert not (tree / "etc/resolv.conf").is_symlink()
    assert os.readlink(tree / "etc/systemd/system/systemd-networkd.service") == "/dev/null"  # noqa: PTH115  # as written
    assert (tree / "etc/systemd/system/multi-user.target.wants/noid-console.service").is_symlink()
    assert not (tree / "etc/noid").exists()  # without sshd no host keys, and no time for them with every wake


def test_a_guest_with_an_ssh_server_asks_for_host_keys_of_its_own(tmp_path: Path) -> None:
    tree = bare_tree(tmp_path / "tree")
    (tree / "usr/sbin").mkdir(parents=True)
    (tree / "usr/sbin/sshd").touch()
    furnish(tree, [], [])
    assert (tree / "etc/noid/ssh-host-keys").read_text() == "ed25519\n"
    unit = (tree / "etc/systemd/system/ssh.service.wants/noid-ssh-keys.service").readlink()
    assert "Before=ssh.service" in (tree / unit.relative_to("/")).read_text()
    assert list((tree / "etc/ssh").iterdir()) == []


def test_a_tree_that_has_our_user_already_is_refused(tmp_path: Path) -> None:
    tree = bare_tree(tmp_path / "tree")
    with (tree / "etc/passwd").open("a") as file:
        file.write("somebody:x:1000:1000::/home/somebody:/bin/sh\n")
    with pytest.raises(BackendError, match=r"somebody.*where user noid should go"):
        furnish(tree, [], [])


def test_a_guest_too_small_to_hold_a_system_is_refused_before_anything_is_done(cache_home: Path) -> None:
    with pytest.raises(InvalidRequest, match="at least 512 MiB"):
        debian_rootfs(size_bytes=100 << 20)
    assert not cache_home.exists()


def test_a_host_that_refuses_user_namespaces_is_named_as_the_reason(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(bin_dir / "mmdebstrap", "echo 'E: unshare syscall failed: Operation not permitted' >&2; exit 25")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(rootfs, "_check_user_namespaces", lambda: None)  # an account that has its range of ids

    with pytest.raises(DependencyDown, match=r"refuses user namespaces.*sudo noid-server image build"):
        rootfs._bootstrap("bookworm", ["bash"], [], tmp_path / "root.tar")


def test_a_program_that_hangs_up_its_process_group_does_not_end_us(bin_dir: Path) -> None:
    script(bin_dir / "which-group", "cut -d' ' -f5 /proc/$$/stat")  # mmdebstrap sends SIGHUP to that when it fails
    assert int(programs.run(["which-group"], "asking")) != os.getpgrp()


def test_an_interrupted_build_ends_the_program_it_waits_for(bin_dir: Path, tmp_path: Path) -> None:
    tidy = f"trap 'echo tidy > {tmp_path}/said; exit 1' TERM"
    until_read = "head -c 200000 /dev/zero"  # more than a pipe holds: when it has gone, somebody waits for us
    script(bin_dir / "slow", f"{tidy}; {until_read}; echo $$ > {tmp_path}/pid; read line < {tmp_path}/never")
    os.mkfifo(tmp_path / "never")
    code = "import sys; from noid.core.guestbuild import programs; programs.run(['slow'], 'waiting')"
    waiting = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
        assert waiting.poll() is None
    waiting.send_signal(signal.SIGINT)
    waiting.communicate(timeout=30)

    assert (tmp_path / "said").read_text() == "tidy\n"
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_a_program_for_which_a_disk_is_full_is_told_as_that(bin_dir: Path) -> None:
    script(bin_dir / "packer", "echo 'packer: /big: No space left on device' >&2; echo 'E: it failed' >&2; exit 2")
    with pytest.raises(NoSpace, match=r"packing failed: packer: /big: No space left on device\. Free space"):
        programs.run(["packer"], "packing")
