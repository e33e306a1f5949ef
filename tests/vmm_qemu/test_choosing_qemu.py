"""What happens before any VM: which QEMU, which accelerator, how fast the clock, and what is said when it cannot be."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import trio
from noid_vmm_qemu.backend import QemuConfig, open_backend
from noid_vmm_qemu.kvm_trial import EXIT_STATUS, rom
from noid_vmm_qemu.probe import missing, parsed_version, probe, trial_arguments
from noid_vmm_qemu.tsc import cpuinfo_khz, measured_khz, tsc_khz

from noid.core.backends import AgentContext
from noid.errors import ConfigError, DependencyDown


def program(directory: Path, script: str) -> str:
    path = directory / "qemu-fake"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def test_a_missing_qemu_is_named_with_the_way_to_get_it(context: AgentContext) -> None:
    with pytest.raises(DependencyDown, match=r"no-such-qemu is not installed.*Install"):
        async with open_backend(QemuConfig(binary="no-such-qemu"), context):
            pass


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ({"ID": "debian"}, "apt install qemu-system-x86"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "apt install qemu-system-x86"),
        ({"ID": "fedora"}, "dnf install qemu-system-x86-core"),
        ({"ID": "plan9"}, "your distribution's QEMU"),
    ],
)
def test_the_way_to_get_it_is_the_distributions(
    monkeypatch: pytest.MonkeyPatch, release: dict[str, str], command: str
) -> None:
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)

    assert command in missing("qemu-system-x86_64")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('echo "QEMU emulator version 6.2.0 (Debian)"', "is QEMU 6.2.0; noid needs at least 7.2.0"),
        ('echo "error while loading shared libraries: libfoo" >&2; exit 127', "does not work .status 127.*libfoo"),
        ("echo hello", "does not work"),
        ("exec sleep 1000", "did not answer"),
    ],
)
async def test_a_qemu_that_cannot_be_used_says_why(
    context: AgentContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    monkeypatch.setattr("noid_vmm_qemu.probe._ANSWER_SECS", 0.5 if "sleep" in script else 10.0)

    with pytest.raises(DependencyDown, match=words):
        async with open_backend(QemuConfig(binary=program(tmp_path, script)), context):
            pass


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright", (7, 2, 22)),
        ("QEMU emulator version 10.0", (10, 0, 0)),
        ("QEMU emulator version 9.1.50 (v9.1.0-1-gdeadbeef)", (9, 1, 50)),
        ("busybox", None),
    ],
)
def test_versions_as_qemu_prints_them(text: str, version: tuple[int, int, int] | None) -> None:
    assert parsed_version(text) == version


@pytest.mark.parametrize(
    ("config", "words"),
    [(QemuConfig(accelerator="hvf"), '"auto" or "kvm" or "tcg"'), (QemuConfig(machine="pc"), '"microvm" or "q35"')],
)
async def test_a_setting_without_meaning_lists_those_with(
    context: AgentContext, config: QemuConfig, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        async with open_backend(config, context):
            pass


async def test_a_kvm_that_kills_or_hangs_its_guests_is_not_used(
    context: AgentContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial decides, not whether /dev/kvm opens: here a QEMU whose guests never come to an end."""
    monkeypatch.setattr("os.access", lambda *_: True)
    monkeypatch.setattr("noid_vmm_qemu.probe._KVM_SECS", 0.3)
    fake = program(
        tmp_path,
        'case "$*" in *--version) echo "QEMU emulator version 7.2.22";; *kvm*) exec sleep 1000;; *) exit 0;; esac',
    )

    found = await probe(fake, context.run_dir, try_kvm=True)

    assert "did not come to its end" in found.kvm_refusal
    assert found.sandbox
    assert not (context.run_dir / "qemu-probe.json").exists(), "a host that was busy once is held for one without KVM"


async def test_a_kvm_that_interprets_its_guests_is_given_up_by_the_processors_time_and_remembered(
    context: AgentContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: True)
    monkeypatch.setattr("noid_vmm_qemu.probe._KVM_CPU_SECS", 1)
    fake = program(
        tmp_path,
        'case "$*" in *--version) echo "QEMU emulator version 7.2.22";; *kvm*) while :; do :; done;; *) exit 0;; esac',
    )

    found = await probe(fake, context.run_dir, try_kvm=True)

    assert "processor's time" in found.kvm_refusal
    assert (context.run_dir / "qemu-probe.json").exists()


async def test_a_kvm_whose_trial_guest_says_the_word_is_used(
    context: AgentContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: True)
    fake = program(
        tmp_path, 'case "$*" in *--version) echo "QEMU emulator version 7.2.22";; *kvm*) exit 85;; *) exit 0;; esac'
    )

    assert (await probe(fake, context.run_dir, try_kvm=True)).kvm_refusal == ""


async def test_what_was_found_is_remembered_until_qemu_changes(context: AgentContext, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    script = f'echo "$*" >> {calls}; case "$*" in *--version) echo "QEMU emulator version %s";; esac'
    fake = program(tmp_path, script % "7.2.22")

    first = await probe(fake, context.run_dir, try_kvm=False)
    asked = len(calls.read_text().splitlines())
    assert await probe(fake, context.run_dir, try_kvm=False) == first
    assert len(calls.read_text().splitlines()) == asked + 1  # its version, nothing else

    program(tmp_path, script % "8.2.0")
    assert (await probe(fake, context.run_dir, try_kvm=False)).version == (8, 2, 0)
    (context.run_dir / "qemu-probe.json").write_text('{"key": ')
    assert (await probe(fake, context.run_dir, try_kvm=False)).version == (8, 2, 0)


@pytest.mark.vm
async def test_the_real_qemu_is_offered_with_an_accelerator_that_was_tried(context: AgentContext) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")

    async with open_backend(QemuConfig(), context) as backend:
        assert backend.features.accelerator in ("kvm", "tcg")
        assert backend.fingerprint()["accelerator"] == backend.features.accelerator
        assert set(backend.fingerprint()) == {"vmm", "version", "accelerator", "machine", "cpu", "devices"}


@pytest.mark.vm
async def test_the_trial_guest_comes_to_its_end_on_a_cpu_that_works(tmp_path: Path) -> None:
    binary = shutil.which("qemu-system-x86_64")
    if binary is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    (bios := tmp_path / "rom").write_bytes(rom())
    argv = [binary, *trial_arguments(str(bios), "tcg", "max")]

    assert (await trio.run_process(argv, check=False)).returncode == EXIT_STATUS


def test_the_clock_is_measured_as_fast_as_it_is() -> None:
    def counter() -> int:
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) * 26 // 10

    assert measured_khz(counter) == pytest.approx(2_600_000, rel=0.001)


def test_measuring_twice_gives_the_same() -> None:
    first = tsc_khz()
    tsc_khz.cache_clear()

    assert tsc_khz() == pytest.approx(first, rel=0.001)


def test_cpuinfo_is_read_where_nothing_can_be_measured() -> None:
    assert cpuinfo_khz("processor\t: 0\ncpu MHz\t\t: 2596.120\n") == 2_596_120
