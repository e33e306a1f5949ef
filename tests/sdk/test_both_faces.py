"""What the SDK does, by either face: the same tests, against a server."""

from __future__ import annotations

from typing import Any

import pytest
import trio

import noid
from noid.errors import InvalidRequest, TooLarge


async def test_a_client_knows_who_it_is_and_asks_anything(client: Any) -> None:
    identity = await client.whoami()
    assert identity["token"] is None
    assert identity == await client.request("GET", "/v1/whoami")
    made = await client.request("POST", "/v1/vms", {"name": "raw", "mem_mib": 128})
    assert made["id"] == (await client.vm("raw")).info["id"]
    assert await client.request("DELETE", "/v1/vms/raw") is None


async def test_a_refusal_says_which(client: Any) -> None:
    with pytest.raises(noid.ServerError, match="'nobody'") as refused:
        await client.vm("nobody")
    assert (refused.value.status, refused.value.code) == (404, "not_found")


async def test_a_vm_lives_and_changes(client: Any) -> None:
    vm = await client.create("web", cpus=2, mem_mib=256, labels={"tier": "front"})
    assert (vm.name, vm.state, vm.info["cpus"], vm.info["mem_mib"]) == ("web", "running", 2, 256)
    assert vm.info["labels"] == {"tier": "front"}
    await vm.pause()
    assert vm.state == "paused"
    await vm.resume()
    await vm.stop(force=True)
    assert (vm.state, vm.info["how"]) == ("stopped", "forced")
    await vm.start()
    await vm.reboot(grace_secs=5)
    assert (await vm.refresh())["state"] == "running"
    await vm.set_labels({"tier": None, "team": "a"})
    await vm.rename("site")
    assert [(each.name, each.info["labels"]) for each in await client.vms(labels=["team"])] == [("site", {"team": "a"})]
    await vm.destroy()
    assert await client.vms() == []


async def test_checkpoints_go_back_and_multiply(client: Any, vm: Any) -> None:
    await vm.run(["sh", "-c", "echo before > /root/word"], check=True)
    checkpoint = await vm.checkpoint(label="then", labels={"kind": "test"})
    await vm.run(["sh", "-c", "echo after > /root/word"], check=True)

    copy = await checkpoint.fork("copy", labels={"of": "web"})
    assert (await copy.run(["cat", "/root/word"])).text == "before\n"
    assert copy.info["labels"] == {"of": "web"}
    restored = await checkpoint.restore()
    assert (restored.name, (await vm.run(["cat", "/root/word"])).text) == ("web", "before\n")
    await vm.restore(checkpoint.id)

    assert [(each.id, each.label, each.vm_name) for each in await vm.checkpoints()] == [(checkpoint.id, "then", "web")]
    await checkpoint.set_labels({"kind": "trial"})
    assert [each.id for each in await client.checkpoints(vm="web", labels=["kind=trial"])] == [checkpoint.id]
    await checkpoint.remove()
    assert await client.checkpoints() == []


async def test_forks_are_all_there_or_none(client: Any, vm: Any) -> None:
    assert [each.name for each in await vm.fork(["one", "two"])] == ["one", "two"]
    made = await vm.fork(2)
    assert len({each.name for each in made} - {"web", "one", "two"}) == 2
    with pytest.raises(noid.ServerError, match="'two'"):
        await vm.fork(["three", "two"])
    assert {each.name for each in await client.vms()} == {"web", "one", "two", *(each.name for each in made)}
    assert await client.checkpoints() == []


async def test_a_command_gives_back_all_it_wrote_and_how_it_ended(vm: Any) -> None:
    done = await vm.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.stdout, done.stderr, done.exit_code, done.signal, done.timed_out) == (
        b"out\n",
        b"err\n",
        3,
        None,
        False,
    )
    assert (await vm.run(["env"], env={"A": "1"})).text.count("A=1\n") == 1
    data = b"".join(b"%07d\n" % number for number in range(100_000))  # more than is on its way at once
    assert (await vm.run(["cat"], input=data, check=True)).stdout == data


async def test_a_command_that_fails_is_an_error_where_that_was_asked_for(vm: Any) -> None:
    with pytest.raises(noid.CommandFailed, match=r"'sh -c echo no >&2; exit 4' ended with exit code 4: no$") as failed:
        await vm.run(["sh", "-c", "echo no >&2; exit 4"], check=True)
    assert failed.value.completed.exit_code == 4
    with pytest.raises(noid.CommandFailed, match="timed out"):
        await vm.run(["sleep", "100"], timeout_secs=0.2, check=True)
    assert (await vm.run(["sleep", "100"], timeout_secs=0.2)).timed_out


async def test_a_command_that_writes_without_end_is_ended(vm: Any) -> None:
    with pytest.raises(TooLarge, match="more than 1000000 bytes of output were not read"):
        await vm.run(["yes"], output_bytes_max=1_000_000)


async def test_a_text_is_no_command(vm: Any) -> None:
    with pytest.raises(TypeError, match=r"\['sh', '-c', text\]"):
        await vm.run("echo hello")
    with pytest.raises(InvalidRequest):
        await vm.run([])


async def test_a_running_command_is_talked_to(vm: Any) -> None:
    async with vm.exec(["cat"], stdin=True) as process:
        for word in (b"one", b"two"):
            await process.send(word)
            assert await anext(process) == (1, word)
        await process.send("three")
        await process.close_input()
        done = await process.wait()
        assert (done.stdout, done.exit_code) == (b"three", 0)


async def test_a_command_is_signalled_and_one_that_is_left_behind_is_ended(vm: Any) -> None:
    async with vm.exec(["ticker"]) as process:
        await anext(process)
        await process.signal("TERM")
        assert (await process.wait()).signal == 15
    async with vm.exec(["ticker"]) as process:
        await anext(process)
        left = process.id
    with trio.fail_after(10):
        while any((each.id, each.info["state"]) == (left, "running") for each in await vm.processes()):
            pass


async def test_a_command_has_a_terminal_of_a_size(vm: Any) -> None:
    async with vm.exec(["stty", "size"], tty=(100, 30)) as process:
        assert (await process.wait()).text == "30 100\r\n"


async def test_a_process_runs_on_and_is_gone_back_to(vm: Any) -> None:
    process = await vm.start_process(["ticker"])
    assert (process.vm, (await process.refresh())["state"]) == ("web", "running")
    async with process.attach() as attached:
        first = await anext(attached)
    async with process.attach(readonly=True) as attached:
        assert (await anext(attached))[1].startswith(first[1])
    async with vm.exec(["ticker"]) as running:
        await anext(running)
        await running.leave()
        left = running.id
    assert {each.id: each.info["state"] for each in await vm.processes()} == {process.id: "running", left: "running"}
    await process.signal(9)
    assert (await process.wait())["signal"] == 9
    await process.remove()
    assert [each.id for each in await vm.processes()] == [left]


async def test_the_console_is_watched_and_typed_at(vm: Any) -> None:
    async with vm.console(history=10_000) as console:
        await console.resize(80, 25)
        await console.send("hello\n")
        seen = b""
        with trio.fail_after(10):
            while b"hello" not in seen:
                seen += await anext(console)


async def test_a_port_is_connected_to_and_both_sides_end(vm: Any) -> None:
    async with vm.connect(7) as connection:  # which gives back what it hears
        await connection.send("hello ")
        assert await anext(connection) == b"hello "
        await connection.send(b"x" * 300_000)
        await connection.send_eof()
        with trio.fail_after(10):
            assert b"".join([data async for data in connection]) == b"x" * 300_000
    async with vm.connect(13, host="127.0.0.1") as connection:
        assert b"".join([data async for data in connection]) == b"the time is now\n"
        await connection.send_eof()
    async with vm.connect(104) as connection:
        assert await anext(connection) == b"half\n"
        with pytest.raises(noid.ServerError) as broken:
            await anext(connection)
    assert broken.value.code == "unreachable"
    with pytest.raises(noid.ServerError) as refused:
        await vm.connect(80).__aenter__()
    assert (refused.value.status, refused.value.code) == (502, "unreachable")


async def test_a_log_is_read_and_followed(vm: Any) -> None:
    async with vm.logs() as log:
        whole = await log.read()
        assert (log.start, log.end) == (0, len(whole))
        assert log.gaps == []
    async with vm.logs(offset=-5) as log:
        assert b"".join([data async for _, data in log]) == whole[-5:]
    async with vm.console() as console, vm.logs(follow=True, offset=len(whole)) as log:
        await console.send("more\n")
        with trio.fail_after(10):
            assert (await anext(log))[0] == 1


async def test_what_happens_is_told(client: Any) -> None:
    async with client.events(kinds=["vm.create", "vm.stop"]) as events:
        vm = await client.create("web", mem_mib=128)
        await vm.stop(force=True)
        created, stopped = await anext(events), await anext(events)
    assert (created.kind, created.vm, created.facts["state"]) == ("vm.create", "web", "running")
    assert stopped.kind == "vm.stop"
    async with client.events(kinds=["vm.stop"], vm="web", after=created.id, follow=False) as events:
        assert [event async for event in events] == [stopped]


async def test_a_temporary_vm_is_gone_afterwards(client: Any) -> None:
    async with client.temporary(mem_mib=128) as vm:
        assert (await vm.run(["echo", "hello"])).text == "hello\n"
        await vm.rename("other")
    assert await client.vms() == []
    with pytest.raises(noid.CommandFailed):
        async with client.temporary(name="mine", mem_mib=128) as vm:
            await vm.run(["false"], check=True)
    async with client.temporary(mem_mib=128) as vm:
        await vm.destroy()
    assert await client.vms() == []
    with pytest.raises(noid.ServerError):
        async with client.temporary(image="nothing"):
            pass


async def test_no_server_is_said(connect: Any, tmp_path: Any) -> None:
    with pytest.raises(noid.ConnectionFailed, match="cannot connect to unix://"):
        await connect(socket=tmp_path / "nobody").vms()
    with pytest.raises(noid.ConnectionFailed, match=r"cannot find 'noid\.invalid'"):
        await connect("http://noid.invalid", token="t").vms()
