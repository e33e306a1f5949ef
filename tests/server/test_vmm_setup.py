"""``noid-server setup``: what is told, what is verified before anything is run, and what is installed where."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from noid.core.config.reading import load_config
from noid.errors import DependencyDown, InvalidRequest
from noid.server.command import cli
from noid.testing.firecracker import SimulatedFirecracker

JAILER = "#!/bin/sh\ntouch {ran}\necho 'Jailer v{version}'\n"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return SimulatedFirecracker(tmp_path / "release").program


def setup(tmp_path: Path, *args: str | Path) -> Result:
    places = ["--into", tmp_path / "bin", "--config", tmp_path / "etc" / "server.toml"]
    return CliRunner().invoke(cli, ["setup", "--vmm", "firecracker", *map(str, args), *map(str, places)])


def jailer(tmp_path: Path, version: str) -> Path:
    path = tmp_path / "some-jailer"
    path.write_text(JAILER.format(ran=tmp_path / "jailer-ran", version=version))
    path.chmod(0o644)  # as a browser leaves it
    return path


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def archive(tmp_path: Path, **contents: Path) -> Path:
    path = tmp_path / "release.tgz"
    with tarfile.open(path, "w:gz") as files:
        for name, content in contents.items():
            files.add(content, f"release-v1.17.0-x86_64/{name}-v1.17.0-x86_64", recursive=False)
        debug = tarfile.TarInfo("release-v1.17.0-x86_64/firecracker-v1.17.0-x86_64.debug")
        debug.size = 4
        files.addfile(debug, io.BytesIO(b"none"))
    return path


def test_without_a_file_it_says_where_the_release_is_and_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = setup(tmp_path)
    assert done.exit_code == 1
    assert "firecracker-microvm/firecracker/releases/download/v1." in done.output
    assert "--checksum" in done.output
    assert not (tmp_path / "etc").exists()


def test_a_vmm_nobody_sets_up_is_refused_with_those_that_are(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["setup", "--vmm", "qumu"])
    assert done.exit_code == 2
    assert "firecracker" in done.output


def test_an_archive_is_verified_unpacked_installed_tried_and_selected(tmp_path: Path, program: Path) -> None:
    version = "1.17.0"
    release = archive(tmp_path, firecracker=program, jailer=jailer(tmp_path, version))
    sums = tmp_path / "release.tgz.sha256.txt"
    sums.write_text(f"{checksum(release)}  release.tgz\n")
    config = tmp_path / "etc" / "server.toml"
    config.parent.mkdir()
    config.write_text('# mine\nlisten = "127.0.0.1:7654"  # and why\n[backends]\nstorage = "copy"\n')
    config.chmod(0o640)
    done = setup(tmp_path, "--file", release, "--checksum", sums)
    assert done.exit_code == 0, (done.output, done.exception)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "bin").iterdir()} == {
        "firecracker": 0o755,
        "jailer": 0o755,
    }
    assert "Firecracker has run a trial guest" in done.output
    text = config.read_text()
    assert text.startswith('# mine\nlisten = "127.0.0.1:7654"  # and why\n')
    assert config.stat().st_mode & 0o777 == 0o640
    read = load_config(config)
    assert (read.backends.vmm, read.backends.storage) == ("firecracker", "copy")
    assert read.plugins["vmm_firecracker"] == {"binary": str(tmp_path / "bin" / "firecracker")}
    again = setup(tmp_path, "--file", program)
    assert again.exit_code == 0
    assert config.read_text() == text
    assert sorted(path.name for path in config.parent.iterdir()) == ["server.toml"]


@pytest.mark.parametrize("wrong", ["0" * 64, "no-such-file"])
def test_what_has_another_checksum_is_not_even_run(tmp_path: Path, program: Path, wrong: str) -> None:
    given = jailer(tmp_path, "1.17.0")
    done = setup(tmp_path, "--file", given, "--jailer", given, "--checksum", wrong)
    assert isinstance(done.exception, InvalidRequest)
    assert not (tmp_path / "jailer-ran").exists()
    assert not (tmp_path / "bin").exists()


def test_programs_of_two_releases_are_refused_and_nothing_is_installed(tmp_path: Path, program: Path) -> None:
    done = setup(tmp_path, "--file", program, "--jailer", jailer(tmp_path, "1.15.2"))
    assert isinstance(done.exception, InvalidRequest)
    assert "not of one release" in str(done.exception)
    assert not (tmp_path / "bin").exists()


def test_a_release_that_is_too_old_is_refused_with_the_reason(tmp_path: Path) -> None:
    done = setup(tmp_path, "--file", SimulatedFirecracker(tmp_path / "old", version="1.14.3").program)
    assert isinstance(done.exception, DependencyDown)
    assert "diff snapshots" in str(done.exception)
    assert not (tmp_path / "bin").exists()


def test_where_kvm_does_not_work_the_program_is_installed_and_not_selected(tmp_path: Path) -> None:
    program = SimulatedFirecracker(tmp_path / "here", kvm="dead").program
    done = setup(tmp_path, "--file", program)
    assert done.exit_code == 1
    assert "fail  kvm" in done.output
    assert "not selected" in done.output
    assert os.access(tmp_path / "bin" / "firecracker", os.X_OK)
    assert not (tmp_path / "etc").exists()


def test_a_configuration_that_would_not_be_read_stays_as_it_was(tmp_path: Path, program: Path) -> None:
    config = tmp_path / "etc" / "server.toml"
    config.parent.mkdir()
    config.write_text('[backends]\nstorge = "copy"\n')
    done = setup(tmp_path, "--file", program)
    assert done.exit_code == 1
    assert "is as it was" in str(done.exception)
    assert config.read_text() == '[backends]\nstorge = "copy"\n'
    assert isinstance(done.exception, Exception)
    assert not isinstance(done.exception, click.ClickException)
