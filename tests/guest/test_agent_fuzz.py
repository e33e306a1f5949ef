"""The agent against bytes nobody meant: its parsers under sanitizers, and the living program."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from noid_exec_vsock.frames import Frame, Message, encode

from .conftest import ROOT, NativeAgent, Wire

HARNESS = Path(__file__).with_name("fuzz_parsers.c")
PARSERS = (
    *("wire.c", "start.c", "users.c", "identity.c", "hooks.c", "files.c", "network.c", "say.c"),
    *("builtin.c", "copy_in.c", "copy_out.c", "tar.c", "tar_in.c", "tar_out.c", "tree.c", "pipes.c", "sha256.c"),
)
ROUNDS = 30_000
SEED = 20260101
HOST_MESSAGES = [Message(number) for number in range(0x01, 0x11) if number != Message.POWER]


def harness(guest_dir: Path, output: Path, compiler: list[str], *flags: str) -> Path:
    sources = [str(guest_dir / name) for name in PARSERS]
    options = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-I", str(guest_dir), *flags]
    built = subprocess.run(
        [*compiler, *options, str(HARNESS), *sources, "-o", str(output)], capture_output=True, text=True, check=False
    )
    if built.returncode and "-fsanitize=address" in " ".join(flags):
        pytest.skip(f"the compiler has no address sanitizer: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    return output


def fuzz(program: Path) -> None:
    done = subprocess.run([program, str(SEED), str(ROUNDS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.deadline(240)
def test_the_parsers_survive_mutation_under_the_undefined_behaviour_sanitizer(
    hatch_build: ModuleType, compiler: None, tmp_path: Path
) -> None:
    zig = [sys.executable, "-m", "ziglang", "cc"]
    fuzz(
        harness(ROOT / hatch_build.GUEST_DIR, tmp_path / "fuzz", zig, "-fsanitize=undefined", "-fno-sanitize-trap=all")
    )


@pytest.mark.deadline(240)
def test_the_parsers_survive_mutation_under_the_address_sanitizer(hatch_build: ModuleType, tmp_path: Path) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed: zig brings no address sanitizer")
    fuzz(
        harness(
            ROOT / hatch_build.GUEST_DIR,
            tmp_path / "fuzz",
            [gcc],
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
        )
    )


def test_the_living_agent_survives_messages_nobody_meant(wire: Wire, agent: NativeAgent) -> None:
    chance = random.Random(SEED)  # noqa: S311  # repeatable, not secret
    wire.sync()
    wire.ping()
    rss_kib = agent.rss_kib()
    for number in range(1500):
        body = bytearray(chance.choice((b"", bytes(12), b"\x01\x00\x00\x00a", chance.randbytes(chance.randrange(60)))))
        if chance.random() < 0.02:
            body = bytearray(chance.randbytes(65536))
        kind = chance.choice([*HOST_MESSAGES, chance.randrange(0x11, 256)])
        raw = bytearray(encode(Frame(type=kind, epoch=wire.epoch, id=chance.randrange(4), body=bytes(body))))
        if kind == Message.SYNC:
            continue  # would begin another conversation
        if chance.random() < 0.3:
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.1:
            del raw[chance.randrange(len(raw)) :]
        wire.socket.sendall(raw)
        if number % 20 == 0:  # its answers must be read, or it rightly stops reading
            wire.send(Message.PING, 5000 + number, b"x")
            while (heard := wire.hear()).id != 5000 + number or heard.type != Message.PONG:
                pass
    assert agent.process.poll() is None
    assert agent.rss_kib() < max(1024, rss_kib + 1100)  # an unfinished START may hold its mebibyte
    assert agent.children() == []
