"""The agent against bytes nobody meant: its parsers, and the whole living program, under sanitizers.

A short run here; ``scripts/fuzz`` makes it a long one, with other seeds, by the variables below.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from noid_exec_vsock.frames import Frame, Message, encode

from .agent_fuzzer import ALL_ANSWERS, AgentFuzzer
from .conftest import ANSWER_SECS, ROOT, NativeAgent, Wire, wait_until_it_listens

HARNESS = Path(__file__).with_name("fuzz_parsers.c")
PARSERS = (
    *("wire.c", "start.c", "users.c", "identity.c", "hooks.c", "files.c", "network.c", "say.c"),
    *("builtin.c", "copy_in.c", "copy_out.c", "tar.c", "tar_in.c", "tar_out.c", "tree.c", "pipes.c", "sha256.c"),
    "connect.c",
)
ROUNDS = 10_000
MESSAGES = 4000
SEED = int(os.environ.get("NOID_FUZZ_SEED", "20260101"))
FUZZ_SECS = float(os.environ.get("NOID_FUZZ_SECS", "0"))
DEADLINE_SECS = 240 + 2 * FUZZ_SECS
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
HOST_MESSAGES = [Message(number) for number in range(0x01, 0x11) if number != Message.POWER]


def seeds() -> Iterator[int]:
    """One, or as many as there is time for."""
    until = time.monotonic() + FUZZ_SECS
    yield SEED
    following = SEED
    while time.monotonic() < until:
        following += 1
        yield following


def compiled(output: Path, compiler: list[str], flags: list[str], sources: list[Path], guest_dir: Path) -> Path:
    options = ["-std=gnu11", "-D_GNU_SOURCE", "-g", "-I", str(guest_dir), *flags]
    built = subprocess.run(
        [*compiler, *options, *map(str, sources), "-o", str(output)], capture_output=True, text=True, check=False
    )
    if built.returncode and any("address" in flag for flag in flags):
        pytest.skip(f"the compiler has no address sanitizer: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    return output


def fuzz_parsers(guest_dir: Path, tmp_path: Path, compiler: list[str], *flags: str) -> None:
    sources = [HARNESS, *(guest_dir / name for name in PARSERS)]
    program = compiled(tmp_path / "fuzz", compiler, list(flags), sources, guest_dir)
    for seed in seeds():
        done = subprocess.run([program, str(seed), str(ROUNDS)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"seed {seed}\n{done.stderr[-3000:]}"


@pytest.fixture
def gcc() -> list[str]:
    found = shutil.which("gcc")
    if found is None:
        pytest.skip("gcc is not installed: zig brings no address sanitizer")
    return [found]


@pytest.mark.deadline(DEADLINE_SECS)
def test_the_parsers_survive_mutation_under_the_undefined_behaviour_sanitizer(
    hatch_build: ModuleType, compiler: None, tmp_path: Path
) -> None:
    zig = [sys.executable, "-m", "ziglang", "cc"]
    fuzz_parsers(ROOT / hatch_build.GUEST_DIR, tmp_path, zig, "-O1", "-fsanitize=undefined", "-fno-sanitize-trap=all")


@pytest.mark.deadline(DEADLINE_SECS)
def test_the_parsers_survive_mutation_under_the_address_sanitizer(
    hatch_build: ModuleType, gcc: list[str], tmp_path: Path
) -> None:
    fuzz_parsers(ROOT / hatch_build.GUEST_DIR, tmp_path, gcc, "-O1", *SANITIZERS)


@pytest.mark.deadline(DEADLINE_SECS)
def test_the_whole_agent_survives_every_message_in_any_order_under_the_address_sanitizer(
    hatch_build: ModuleType, gcc: list[str], tmp_path: Path
) -> None:
    guest_dir = ROOT / hatch_build.GUEST_DIR
    program = compiled(tmp_path / "agent", gcc, list(SANITIZERS), sorted(guest_dir.glob("*.c")), guest_dir)
    said: Counter[str] = Counter()
    heard: Counter[str] = Counter()
    for seed in seeds():
        life = tmp_path / str(seed)
        life.mkdir()
        fuzzer = live_and_die(program, life, seed)
        said += fuzzer.said
        heard += fuzzer.heard
        shutil.rmtree(life)
    assert {message.name for message in HOST_MESSAGES} - set(said) == set()
    assert {message.name for message in ALL_ANSWERS} - set(heard) == set()


def live_and_die(program: Path, directory: Path, seed: int) -> AgentFuzzer:
    """Run an agent from its start to the end it is asked for, and fail with what a sanitizer said of it."""
    sanitizer = f"log_path={directory}/report:exitcode=99:print_stacktrace=1"
    agent = subprocess.Popen(
        [program, "--socket", directory / "socket"],
        cwd=directory,
        env={**os.environ, "ASAN_OPTIONS": sanitizer, "UBSAN_OPTIONS": sanitizer},
        stdin=subprocess.DEVNULL,
    )
    native = NativeAgent(agent, directory / "socket")
    wire: Wire | None = None
    try:
        wait_until_it_listens(agent, native.path)
        files = native.open_files()
        wire = Wire(native.path)
        fuzzer = AgentFuzzer(wire, seed, directory)
        fuzzer.run(MESSAGES)
        fuzzer.release_all()
        ends_by = time.monotonic() + ANSWER_SECS
        while native.children() or native.open_files() > files + 1:  # children may leave others, which hold pipes
            assert time.monotonic() < ends_by, f"seed {seed}: {native.children()}, {native.open_files() - files} files"
            time.sleep(0.005)
        fuzzer.power_off()
        assert agent.wait(ANSWER_SECS) == 0, f"seed {seed}"  # else what it leaked is in the report
    finally:
        native.kill_what_it_started()
        agent.kill()
        agent.wait()
        if wire is not None:
            wire.socket.close()
        reports = "\n".join(path.read_text() for path in directory.glob("report*"))
        assert not reports, f"seed {seed}\n{reports[:6000]}"
    return fuzzer


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
