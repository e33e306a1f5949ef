"""TCP connections made by the real agent: every byte both ways, ends that are ends, and breaks that are none."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest
import trio
from noid_exec_vsock import frames
from noid_exec_vsock.frames import Message
from noid_exec_vsock.guest import AgentGuest, connect
from noid_exec_vsock.tunnel import Tunnel

from noid.core.backends import GuestConnection
from noid.core.model.connections import ConnectRequest
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest
from noid.errors import BackendError, DependencyDown, InvalidRequest, NoidError, Unreachable, Unsupported

from .conftest import ANSWER_SECS, NativeAgent, to, until
from .liar import HELLO, Liar, conversation

SOME = 300_000


@contextlib.contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, 0))
        sock.listen(200)
        yield sock


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


@contextlib.asynccontextmanager
async def connected(guest: AgentGuest) -> AsyncIterator[tuple[GuestConnection, trio.SocketStream]]:
    """Yield both ends of a connection through the guest's agent."""
    with listening() as listener:
        connection = await guest.connect(ConnectRequest(port=port_of(listener)))
        accepted, _ = listener.accept()  # it stands already
        served = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
        try:
            async with served:
                yield connection, served
        finally:
            with trio.CancelScope(shield=True):
                await connection.aclose()


async def everything(connection: GuestConnection | trio.SocketStream) -> bytes:
    received = bytearray()
    while data := await connection.receive_some():
        received += data
    return bytes(received)


async def is_reset(served: trio.SocketStream) -> bool:
    """Whether *served* is broken off, and not ended, after what it may still have to read."""
    try:
        await everything(served)
    except trio.BrokenResourceError:
        return True
    return False


async def test_bytes_arrive_both_ways_at_once_and_both_ends_are_told(guest: AgentGuest) -> None:
    there, back = os.urandom(SOME), os.urandom(2 * SOME)
    async with connected(guest) as (connection, served), trio.open_nursery() as nursery:

        async def serve() -> None:
            async with trio.open_nursery() as both:
                both.start_soon(served.send_all, back)
                assert await everything(served) == there
            await served.send_eof()

        async def send() -> None:
            await connection.send_all(there)
            await connection.send_eof()

        nursery.start_soon(serve)
        nursery.start_soon(send)
        assert await everything(connection) == back
        await connection.wait_closed()
        assert await connection.receive_some() == b""


async def test_the_guest_can_end_its_side_first_and_still_hear(guest: AgentGuest) -> None:
    async with connected(guest) as (connection, served):
        await served.send_all(b"bye")
        await served.send_eof()
        assert await everything(connection) == b"bye"
        await connection.send_all(b"but listen")
        await connection.send_eof()
        assert await everything(served) == b"but listen"
        await connection.wait_closed()


async def test_what_is_let_go_before_its_end_is_reset_in_the_guest(guest: AgentGuest) -> None:
    async with connected(guest) as (connection, served):
        await connection.send_all(b"half an upl")
        assert await served.receive_some() == b"half an upl"
        await connection.aclose()
        assert await is_reset(served)


async def test_an_input_that_ends_without_its_mark_is_no_end(guest: AgentGuest) -> None:
    with listening() as listener:
        argv = ("connect", "127.0.0.1", str(port_of(listener)))
        process = await guest.start_builtin(ExecRequest(argv=argv, stdin=True))
        accepted, _ = listener.accept()
        async with trio.SocketStream(trio.socket.from_stdlib_socket(accepted)) as served:
            await process.send_stdin(struct.pack("<I", 10) + b"half")
            assert await served.receive_some() == b"half"
            await process.close_stdin()
            assert await is_reset(served)
        while not isinstance(ended := await process.receive(), ProcessExit):
            pass
        assert ended.code == 2
        await guest.release(process)


async def test_a_connection_that_broke_costs_nothing_while_what_came_is_not_read(
    guest: AgentGuest, agent: NativeAgent
) -> None:
    async with connected(guest) as (connection, served):
        with trio.move_on_after(0.2):
            while True:
                await served.send_all(bytes(65536))
        served.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await served.aclose()
        [child] = agent.children()
        before = NativeAgent.cpu_ticks_of(child)
        await trio.sleep(0.3)
        assert NativeAgent.cpu_ticks_of(child) - before <= 1
        with pytest.raises(Unreachable, match="broke"):
            await everything(connection)


async def test_a_host_that_is_gone_leaves_connections_reset(agent: NativeAgent) -> None:
    async with connect(to(agent)) as guest:
        with listening() as listener:
            connection = await guest.connect(ConnectRequest(port=port_of(listener)))
            accepted, _ = listener.accept()
            await connection.send_all(b"half")
    async with trio.SocketStream(trio.socket.from_stdlib_socket(accepted)) as served:
        assert await is_reset(served)
    await until(lambda: not agent.children())


async def test_a_reset_in_the_guest_is_told_after_what_came_before(guest: AgentGuest) -> None:
    async with connected(guest) as (connection, served):
        await served.send_all(b"one moment")
        assert await connection.receive_some() == b"one moment"
        served.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await served.aclose()
        with pytest.raises(Unreachable, match=r"localhost:\d+ in the guest broke"):
            await everything(connection)


async def test_a_server_that_hangs_up_on_an_upload_is_heard_to_the_end_and_then_a_break(guest: AgentGuest) -> None:
    async with connected(guest) as (connection, served):
        await served.send_all(b"too large")
        await served.aclose()  # with nothing unread: an orderly end, of a side that will hear no more
        assert await everything(connection) == b"too large"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send_for_ever, connection)
            with trio.fail_after(ANSWER_SECS), pytest.raises(Unreachable, match="broke"):
                await connection.wait_closed()
            nursery.cancel_scope.cancel()


async def _send_for_ever(connection: GuestConnection) -> None:
    while True:
        await connection.send_all(b"more")


async def test_who_does_not_read_holds_back_the_other_side_and_nobody_else(guest: AgentGuest) -> None:
    async with connected(guest) as (first, served), connected(guest) as (second, other):
        sent = 0
        with trio.move_on_after(0.5):
            while True:
                await served.send_all(bytes(65536))
                sent += 65536
        with trio.move_on_after(0.5):
            await first.send_all(bytes(64 << 20))  # the server reads nothing
        assert sent < 32 << 20
        await second.send_all(b"?")
        assert await other.receive_some() == b"?"
        await other.send_all(b"!")
        assert await second.receive_some() == b"!"


async def test_nothing_is_lost_in_small_pieces(guest: AgentGuest) -> None:
    async with connected(guest) as (connection, served):
        for i in range(300):
            await connection.send_all(bytes([i % 256]) * (i % 7 + 1))
        await connection.send_eof()
        assert await everything(served) == b"".join(bytes([i % 256]) * (i % 7 + 1) for i in range(300))


async def test_a_hundred_connections_at_once_each_have_their_own_bytes(guest: AgentGuest) -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async with stream:
            while data := await stream.receive_some():
                await stream.send_all(data)

    async def ask(port: int, number: int) -> None:
        connection = await guest.connect(ConnectRequest(port=port))
        await connection.send_all(b"%d " % number * 1000)
        await connection.send_eof()
        assert await everything(connection) == b"%d " % number * 1000
        await connection.wait_closed()
        await connection.aclose()

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
        async with trio.open_nursery() as asking:
            for number in range(100):
                asking.start_soon(ask, listener.socket.getsockname()[1], number)
        nursery.cancel_scope.cancel()


async def test_localhost_is_also_the_other_loopback_address(guest: AgentGuest) -> None:
    try:
        listener = listening("::1")
        with listener as sock:
            connection = await guest.connect(ConnectRequest(port=port_of(sock)))
            await connection.aclose()
            connection = await guest.connect(ConnectRequest(port=port_of(sock), host="::1"))
            await connection.aclose()
            with pytest.raises(Unreachable):
                await guest.connect(ConnectRequest(port=port_of(sock), host="127.0.0.1"))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


async def test_where_nothing_listens_says_so(guest: AgentGuest, agent: NativeAgent) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(Unreachable, match=r"nothing listens at localhost:\d+"):
            await guest.connect(ConnectRequest(port=port_of(taken)))
    with pytest.raises((Unreachable, InvalidRequest)):
        await guest.connect(ConnectRequest(port=80, host="255.255.255.255"))
    with pytest.raises(InvalidRequest):
        await guest.connect(ConnectRequest(port=80, host="not an address"))
    with pytest.raises(InvalidRequest, match="no user"):
        await guest.connect(ConnectRequest(port=80, user="nobody-of-that-name"))
    await until(lambda: not agent.children())
    assert await guest.processes() == []


async def test_connecting_that_is_given_up_leaves_nothing(guest: AgentGuest, agent: NativeAgent) -> None:
    with listening() as listener:
        with trio.CancelScope() as scope:
            scope.cancel()
            await guest.connect(ConnectRequest(port=port_of(listener)))
        assert scope.cancelled_caught
        await until(lambda: not agent.children())


# --- agents that are old, or lie ------------------------------------------------------------------------------------


async def test_an_agent_from_before_says_so_in_words_that_help() -> None:
    async with conversation(HELLO) as (guest, _):
        assert "ports" not in guest.features
        assert "files" in guest.features
        with pytest.raises(Unsupported, match=r"older noid .* noid stop, then noid start"):
            await guest.connect(ConnectRequest(port=80))


BUILTINS = b"copy-out copy-in connect"
NEW_HELLO = HELLO + struct.pack("<I", len(BUILTINS)) + BUILTINS


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (Message.STDERR, b"connected\nconnected\n"),
        (Message.STDERR, b"end 0\n"),
        (Message.STDERR, b"welcome\n"),
        (Message.STDERR, b"x" * 2000),
        (Message.STDERR, b"connected\nend 3\nend 3\n"),
        (Message.STDERR, b"connected\nend 99999999999999999999\n"),
    ],
)
async def test_what_an_agent_cannot_mean_ends_the_connection(stream: Message, said: bytes) -> None:
    async with conversation(NEW_HELLO) as (guest, liar), trio.open_nursery() as nursery:
        nursery.start_soon(_lie, liar, [(stream, said)])
        with pytest.raises(BackendError, match="does not do its part"):
            await everything(await guest.connect(ConnectRequest(port=80)))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ([(Message.STDERR, b"connected\nend 2\n"), (Message.STDOUT, b"abc")], BackendError),
        ([(Message.STDERR, b"connected\n"), (Message.STDOUT, b"abc"), (Message.STDERR, b"end 2\n")], BackendError),
        (
            [(Message.STDERR, b"connected\nend 4\n"), (Message.STDOUT, b"abc"), (Message.EXIT, bytes(26))],
            DependencyDown,
        ),
        ([(Message.STDERR, b"connected\n"), (Message.EXIT, bytes(26))], DependencyDown),
        ([(Message.EXIT, b"\1\x09" + bytes(24))], DependencyDown),
        ([(Message.STDERR, b"error 111 \x1b[2J\n"), (Message.EXIT, b"\0\2" + bytes(24))], Unreachable),
    ],
    ids=["more than it said", "less than it sent", "short", "no end", "killed", "refused"],
)
async def test_a_count_that_is_wrong_is_no_end(said: list[tuple[Message, bytes]], error: type[NoidError]) -> None:
    async with conversation(NEW_HELLO) as (guest, liar), trio.open_nursery() as nursery:
        nursery.start_soon(_lie, liar, said)
        with pytest.raises(error) as told:
            await everything(await guest.connect(ConnectRequest(port=80)))
        assert "\x1b" not in str(told.value)
        nursery.cancel_scope.cancel()


async def _lie(liar: Liar, said: list[tuple[Message, bytes]]) -> None:
    number = await liar.start()
    offset = 0
    for kind, body in said:
        if kind == Message.EXIT:
            await liar.say(kind, number, body)
            continue
        await liar.say(kind, number, struct.pack("<Q", offset) + body)
        offset += len(body)
    parting = await liar.hear(Message.RELEASE)
    await liar.say(Message.RELEASED, parting.id)


async def test_what_is_read_early_is_not_lost_and_not_endless() -> None:
    async with conversation(NEW_HELLO) as (guest, liar), trio.open_nursery() as nursery:
        nursery.start_soon(_lie, liar, [(Message.STDOUT, b"early"), (Message.STDERR, b"connected\nend 5\n")])
        connection = await guest.connect(ConnectRequest(port=80))
        assert isinstance(connection, Tunnel)
        assert await everything(connection) == b"early"
        nursery.cancel_scope.cancel()
    async with conversation(NEW_HELLO) as (guest, liar), trio.open_nursery() as nursery:
        nursery.start_soon(_lie, liar, [(Message.STDOUT, bytes(50_000))] * 6)
        with pytest.raises(BackendError, match="without saying that it is connected"):
            await guest.connect(ConnectRequest(port=80))
        nursery.cancel_scope.cancel()


def test_hello_tells_what_the_agent_can_and_an_old_one_what_it_could() -> None:
    assert frames.read_hello(HELLO).builtins == {"copy-out", "copy-in"}
    assert frames.read_hello(NEW_HELLO).builtins == {"copy-out", "copy-in", "connect"}
    with pytest.raises(frames.ProtocolError):
        frames.read_hello(NEW_HELLO[:-1])
