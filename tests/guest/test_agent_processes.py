"""What running a program in a guest means, against the real agent."""

from __future__ import annotations

import os
import pwd
import signal
import time
from pathlib import Path

import pytest
import trio
from noid_exec_vsock.guest import AgentGuest, connect
from noid_exec_vsock.process import OUTPUT_WINDOW_BYTES, GuestProcess

from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.processes import ExecRequest
from noid.core.model.vms import Identity
from noid.errors import BackendError, Conflict, DependencyDown, InvalidRequest, TooLarge
from noid.testing.vmm_rig import run

from .conftest import NativeAgent, to, until


async def output_of(process: GuestProcess, needed: bytes) -> None:
    said = b""
    while needed not in said:
        chunk = await process.receive()
        assert isinstance(chunk, OutputChunk), f"it ended with {chunk} having said {said!r}"
        said += chunk.data


async def test_stdout_stderr_and_the_exit_code_come_apart(guest: AgentGuest) -> None:
    done = await run(guest, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.stdout, done.stderr, done.end) == (b"out\n", b"err\n", ProcessExit(code=3))


async def test_a_missing_program_ends_with_127_and_one_that_may_not_run_with_126(guest: AgentGuest) -> None:
    missing = await run(guest, "no-such-program")
    assert missing.end == ProcessExit(code=127)
    assert missing.stderr == b"noid: cannot run 'no-such-program': command not found\n"
    assert (await run(guest, "/etc/passwd")).end == ProcessExit(code=126)
    assert (await run(guest, "/")).end == ProcessExit(code=126)


async def test_arguments_reach_the_program_byte_for_byte(guest: AgentGuest) -> None:
    awkward = ["", " ", "a b", "'\"", "$HOME", "\n", "\x7e\x7d", "ü", "\udcff", "-n"]
    done = await run(guest, "printf", "%s|", *awkward)
    assert done.stdout == "|".join([*awkward, ""]).encode("utf-8", "surrogateescape")


async def test_binary_output_and_input_pass_unchanged(guest: AgentGuest) -> None:
    data = bytes(range(256)) * 700 + b"\x7e" * 5000 + b"\x7d\x5e" * 5000
    assert (await run(guest, "cat", stdin=data)).stdout == data


async def test_a_signal_ends_the_whole_group(guest: AgentGuest) -> None:
    process = await guest.start(ExecRequest(argv=("sh", "-c", "sleep 1000 & echo $!; wait")))
    child = await process.receive()
    assert isinstance(child, OutputChunk)
    await process.signal(signal.SIGKILL)
    assert await process.receive() == ProcessExit(code=None, signal=signal.SIGKILL)
    await until(lambda: not _alive(int(child.data)))
    await process.signal(signal.SIGTERM)  # an ended process: nothing
    with pytest.raises(InvalidRequest):
        await process.signal(65)


async def test_a_program_begins_with_default_signals(guest: AgentGuest) -> None:
    done = await run(guest, "sh", "-c", "grep -E 'Sig(Ign|Blk)' /proc/self/status")
    assert [int(line.split()[1], 16) for line in done.stdout.splitlines()] == [0, 0]


async def test_stdin_is_empty_unless_asked_for(guest: AgentGuest) -> None:
    process = await guest.start(ExecRequest(argv=("cat",)))
    assert await process.receive() == ProcessExit(code=0)
    with pytest.raises(InvalidRequest, match="without stdin"):
        await process.send_stdin(b"x")


async def test_stdin_flows_until_it_is_closed(guest: AgentGuest) -> None:
    process = await guest.start(ExecRequest(argv=("cat",), stdin=True))
    await process.send_stdin(b"first")
    assert await process.receive() == OutputChunk(stream=1, data=b"first")
    await process.send_stdin(b"second")
    await process.close_stdin()
    await process.close_stdin()
    assert await process.receive() == OutputChunk(stream=1, data=b"second", offset=5)
    assert await process.receive() == ProcessExit(code=0)
    assert await process.receive() == ProcessExit(code=0)


async def test_a_process_that_does_not_read_its_stdin_holds_up_its_sender_only(guest: AgentGuest) -> None:
    process = await guest.start(ExecRequest(argv=("sleep", "1000"), stdin=True))
    with trio.move_on_after(0.3) as scope:
        await process.send_stdin(bytes(1 << 20))
    assert scope.cancelled_caught
    assert (await run(guest, "echo", "fine")).stdout == b"fine\n"
    await guest.release(process)


async def test_stdin_for_a_process_that_closed_it_is_ignored(guest: AgentGuest) -> None:
    process = await guest.start(ExecRequest(argv=("sh", "-c", "exec <&-; echo closed; sleep 1000"), stdin=True))
    await output_of(process, b"closed")
    await process.send_stdin(bytes(1 << 20))
    await guest.release(process)


async def test_environment_and_directory_are_what_was_asked(guest: AgentGuest, tmp_path: Path) -> None:
    done = await run(
        guest, "sh", "-c", 'printf "%s|" "$A" "$LANG" "$HOME" "$PATH"; pwd', env={"A": "1 =\n2"}, cwd="/usr"
    )
    home = pwd.getpwuid(os.geteuid()).pw_dir
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert done.stdout.decode() == f"1 =\n2|C.UTF-8|{home}|{path}|/usr\n"
    assert (await run(guest, "sh", "-c", "echo $LANG", env={"LANG": "C"})).stdout == b"C\n"
    assert (await run(guest, "pwd")).stdout.decode() == f"{home}\n"
    program = tmp_path / "found-by-path"
    program.write_text("#!/bin/sh\necho found\n")
    program.chmod(0o755)
    assert (await run(guest, "found-by-path", env={"PATH": str(tmp_path)})).stdout == b"found\n"


async def test_a_directory_that_cannot_be_entered_and_an_unknown_user_are_refused(guest: AgentGuest) -> None:
    for cwd in ("/nowhere", "/etc/passwd"):
        with pytest.raises(InvalidRequest, match="working directory"):
            await guest.start(ExecRequest(argv=("true",), cwd=cwd))
    with pytest.raises(InvalidRequest, match="no user 'nobody-at-all'"):
        await guest.start(ExecRequest(argv=("true",), user="nobody-at-all"))
    with pytest.raises(InvalidRequest, match="NUL"):
        await guest.start(ExecRequest(argv=("true",), cwd="/\0"))
    with pytest.raises(InvalidRequest):
        await guest.start(ExecRequest(argv=("true",), user="x" * 64))
    for request in (ExecRequest(argv=("\ud800",)), ExecRequest(argv=("true",), env={"A": "\udd00"})):
        with pytest.raises(InvalidRequest, match="half a character"):
            await guest.start(request)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
async def test_a_user_is_taken_by_name_or_number_with_its_groups(guest: AgentGuest) -> None:
    assert (await run(guest, "id", "-un", user="daemon", cwd="/")).stdout == b"daemon\n"
    assert (await run(guest, "id", "-u", user="1", cwd="/")).stdout == b"1\n"
    assert (await run(guest, "sh", "-c", "id -u; id -g; id -G", user="54321")).stdout == b"54321\n54321\n54321\n"


async def test_two_hundred_processes_run_at_once(guest: AgentGuest, agent: NativeAgent) -> None:
    files = agent.open_files()
    said: list[bytes] = []

    async def one(number: int) -> None:
        said.append((await run(guest, "sh", "-c", f"read x; echo {number} $x", stdin=b"go\n")).stdout)

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(one, number)
    assert sorted(said) == sorted(f"{number} go\n".encode() for number in range(200))
    assert agent.open_files() == files
    assert agent.children() == []


async def test_the_513th_process_is_refused_and_the_others_live(guest: AgentGuest) -> None:
    sleeper = ExecRequest(argv=("sleep", "1000"))
    processes = [await guest.start(sleeper) for _ in range(512)]
    with pytest.raises(BackendError, match="512 processes"):
        await guest.start(sleeper)
    async with trio.open_nursery() as nursery:
        for process in processes:
            nursery.start_soon(guest.release, process)
    assert (await run(guest, "echo", "room")).stdout == b"room\n"


async def test_a_reader_that_stalls_stops_its_process_and_delays_nobody(guest: AgentGuest) -> None:
    stalled = await guest.start(ExecRequest(argv=("sh", "-c", "yes & yes >&2")))
    assert isinstance(await stalled.receive(), OutputChunk)
    flowing = await guest.start(ExecRequest(argv=("yes",)))

    async def drain() -> None:
        while True:
            await flowing.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        for _ in range(20):
            with trio.fail_after(5):
                assert (await run(guest, "echo", "prompt")).stdout == b"prompt\n"
        nursery.cancel_scope.cancel()
    assert stalled._backlog.size <= OUTPUT_WINDOW_BYTES
    await guest.release(stalled)
    await guest.release(flowing)


async def test_much_output_arrives_whole_and_in_order(guest: AgentGuest) -> None:
    process = await guest.start(ExecRequest(argv=("seq", "1000000")))
    said = bytearray()
    while isinstance(chunk := await process.receive(), OutputChunk):
        said += chunk.data
    assert bytes(said) == b"".join(b"%d\n" % number for number in range(1, 1000001))
    assert chunk == ProcessExit(code=0)
    assert process.usage is not None
    assert process.usage.rss_max_kib > 0


async def test_a_daemon_left_behind_delays_no_exit_and_is_not_killed_by_writing(
    guest: AgentGuest, tmp_path: Path
) -> None:
    mark = tmp_path / "written"
    script = f"(while [ ! -e {mark}.go ]; do sleep 0.01; done; echo late && touch {mark}) & echo early"
    process = await guest.start(ExecRequest(argv=("sh", "-c", script)))
    assert await process.receive() == OutputChunk(stream=1, data=b"early\n")
    assert await process.receive() == ProcessExit(code=0)
    await guest.release(process)
    assert (await run(guest, "touch", f"{mark}.go")).end == ProcessExit(code=0)
    await until(mark.exists)


async def test_output_written_just_before_the_end_is_not_lost(guest: AgentGuest) -> None:
    for size in (1, 4096, 65536):
        done = await run(guest, "sh", "-c", f"head -c {size} /dev/zero; sleep 1000 & exit 4")
        assert (len(done.stdout), done.end) == (size, ProcessExit(code=4))


async def test_release_ends_a_process_with_term_and_one_that_ignores_it_with_kill(
    guest: AgentGuest, agent: NativeAgent
) -> None:
    polite = await guest.start(ExecRequest(argv=("sleep", "1000")))
    began = time.monotonic()
    await guest.release(polite)
    assert time.monotonic() - began < 1.9, "TERM was enough, the grace need not be waited for"
    stubborn = await guest.start(ExecRequest(argv=("sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done")))
    await output_of(stubborn, b"up")
    await guest.release(stubborn)
    assert agent.children() == []
    with pytest.raises(Conflict, match="released"):
        await stubborn.receive()
    await guest.release(stubborn)


async def test_release_gives_the_rest_of_the_group_its_grace_too(guest: AgentGuest, tmp_path: Path) -> None:
    child = f"trap 'sleep 0.1; touch {tmp_path}/tidied; exit' TERM; echo up; while :; do sleep 0.01; done"
    tidy = await guest.start(ExecRequest(argv=("sh", "-c", f"({child}) & exec sleep 1000")))
    await output_of(tidy, b"up")
    await guest.release(tidy)
    await until((tmp_path / "tidied").exists)
    stubborn = await guest.start(
        ExecRequest(argv=("sh", "-c", "(trap '' TERM; sh -c 'echo $PPID'; sleep 1000) & exec sleep 1000"))
    )
    said = await stubborn.receive()
    assert isinstance(said, OutputChunk)
    await guest.release(stubborn)
    await until(lambda: not _alive(int(said.data)))


async def test_a_start_that_is_cancelled_leaves_no_process(guest: AgentGuest, agent: NativeAgent) -> None:
    for _ in range(20):
        with trio.CancelScope() as scope:
            scope.cancel()
            await guest.start(ExecRequest(argv=("sleep", "1000")))
        with trio.move_on_after(0.0002):
            await guest.start(ExecRequest(argv=("sleep", "1000")))
    await guest.ping()
    await until(lambda: not agent.children())


async def test_arguments_and_environment_up_to_a_mebibyte_fit(guest: AgentGuest) -> None:
    big = {f"V{number}": "x" * 30_000 for number in range(30)}
    done = await run(guest, "sh", "-c", "env | wc -c", env=big)
    assert int(done.stdout) > 900_000
    with pytest.raises(TooLarge, match="stdin or a file"):
        await guest.start(ExecRequest(argv=("true",), env={f"V{number}": "x" * 30_000 for number in range(40)}))


async def test_an_idle_agent_uses_no_processor_and_little_memory(guest: AgentGuest, agent: NativeAgent) -> None:
    sleeper = await guest.start(ExecRequest(argv=("sleep", "1000"), stdin=True))
    stalled = await guest.start(ExecRequest(argv=("yes",)))
    await until(lambda: stalled._backlog.size == OUTPUT_WINDOW_BYTES)
    await guest.ping()
    ticks = agent.cpu_ticks()
    await trio.sleep(1)
    assert agent.cpu_ticks() == ticks
    assert agent.rss_kib() < 1024
    await guest.release(sleeper)
    await guest.release(stalled)


async def test_memory_files_and_processes_do_not_grow_with_use(guest: AgentGuest, agent: NativeAgent) -> None:
    await guest.ping()
    files = agent.open_files()
    await run(guest, "cat", stdin=bytes(100_000))
    rss_kib = agent.rss_kib()
    for _ in range(300):
        await run(guest, "true", stdin=b"x")
    assert agent.rss_kib() <= rss_kib + 64
    await until(lambda: agent.open_files() == files)  # the last one's pipes may be closed after its exit was told
    assert agent.children() == []


async def test_an_agent_that_owns_no_machine_changes_no_identity(guest: AgentGuest) -> None:
    name = os.uname().nodename
    receipt = await guest.wake(
        Identity(hostname="not-me", machine_id="0" * 32, unix_ns=0, entropy=bytes(32), generation=3)
    )
    assert [item.name for item in receipt.items] == [
        "randomness", "clock", "hostname", "machine-id", "boot-id", "generation",
    ]  # fmt: skip
    assert {item.status for item in receipt.items} == {"not_possible"}
    assert os.uname().nodename == name


async def test_everybody_who_waits_hears_that_the_guest_died(agent: NativeAgent) -> None:
    failures: list[str] = []
    async with connect(to(agent)) as guest, trio.open_nursery() as nursery:
        silent = await guest.start(ExecRequest(argv=("sleep", "1000")))
        full = await guest.start(ExecRequest(argv=("sleep", "1000"), stdin=True))

        async def expect_end(wait: object, *arguments: object) -> None:
            assert callable(wait)
            with pytest.raises(DependencyDown):
                await wait(*arguments)
            failures.append(str(wait))

        nursery.start_soon(expect_end, silent.receive)
        nursery.start_soon(expect_end, full.send_stdin, bytes(1 << 20))
        await trio.testing.wait_all_tasks_blocked(0.05)
        await guest.power_off()  # natively: the agent ends
        agent.process.wait(10)
        await expect_end(guest.ping)
        await expect_end(guest.start, ExecRequest(argv=("true",)))
        await guest.release(silent)
    assert len(failures) == 4
    for pid in (silent.pid, full.pid):
        os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_builtin_runs_inside_the_agents_program_and_one_that_is_not_there_ends_with_127(
    guest: AgentGuest,
) -> None:
    process = await guest.start_builtin(ExecRequest(argv=("sh", "-c", "echo a shell")))
    assert await process.receive() == OutputChunk(stream=2, data=b"noid: the guest agent has no builtin 'sh'\n")
    assert await process.receive() == ProcessExit(code=127)
