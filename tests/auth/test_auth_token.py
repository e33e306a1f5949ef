"""The keeper of tokens: who gets in, what is kept, and what several processes may do at once."""

from __future__ import annotations

import fcntl
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import noid_auth_token
import pytest
import trio
import trio.testing
from noid_auth_token import TokenConfig, open_auth
from noid_auth_token.tokens import hash_of, migrations
from sqlite_utils import Database

from noid.core.backends import AgentContext, AuthBackend
from noid.core.model.users import TOKEN_SCOPES, Credentials, User
from noid.errors import Damaged
from noid.testing.auth_conformance import ANNA, BERT, AuthConformance

ELSEWHERE = """
import sys, trio
from pathlib import Path
from noid.core.backends import AgentContext
from noid.core.model.times import now
from noid.core.model.users import User
from noid_auth_token import TokenConfig, open_auth

async def main(database, verb, user_id):
    context = AgentContext(data_dir=database.parent, run_dir=database.parent, database=database)
    async with open_auth(TokenConfig(), context) as auth:
        user = User(id=user_id, name=user_id, created_at=now())
        print(await (auth.revoke_tokens(user) if verb == "revoke" else auth.create_token(user, name=verb)))

trio.run(main, Path(sys.argv[1]), *sys.argv[2:])
"""


def context(tmp_path: Path) -> AgentContext:
    return AgentContext(data_dir=tmp_path, run_dir=tmp_path, database=tmp_path / "noid.db")


def database_files(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.iterdir() if path.name.startswith("noid.db")]


def start_elsewhere(tmp_path: Path, verb: str, user: User) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "noid.db"), verb, user.id]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


@pytest.fixture
async def auth(tmp_path: Path) -> AsyncIterator[AuthBackend]:
    async with open_auth(TokenConfig(), context(tmp_path)) as auth:
        yield auth


class TestTheKeeperOfTokens(AuthConformance):
    @pytest.fixture
    def open_again(self, tmp_path: Path) -> Callable[[], AbstractAsyncContextManager[AuthBackend]]:
        return lambda: open_auth(TokenConfig(), context(tmp_path))


def owner(auth: AuthBackend, token: str) -> str | None:
    grant = auth.authenticate(Credentials(token=token))
    return None if grant is None else grant.user_id


async def test_nothing_but_the_exact_token_gets_in(auth: AuthBackend) -> None:
    token = await auth.create_token(ANNA)
    last = "0" if token[-1] != "0" else "1"
    near = (token[:-1] + last, token[:-1], token + "0", token.upper(), token.removeprefix("noid_tok_"), " " + token)
    far = ("", "noid_tok_", "noid_tok_" + "é" * 64, "noid_tok_" + "\udcff" * 64, "' OR 1 --")
    for wrong in (*near, *far):
        assert auth.authenticate(Credentials(token=wrong)) is None
    assert auth.authenticate(Credentials(peer_uid=0)) is None


async def test_tokens_made_and_revoked_by_another_process_count_at_once(auth: AuthBackend, tmp_path: Path) -> None:
    made, _ = await trio.to_thread.run_sync(start_elsewhere(tmp_path, "create", ANNA).communicate)
    assert owner(auth, made.strip()) == ANNA.id
    await trio.to_thread.run_sync(start_elsewhere(tmp_path, "revoke", ANNA).communicate)
    assert owner(auth, made.strip()) is None


async def test_processes_that_start_at_once_on_no_database_all_work(tmp_path: Path) -> None:
    started = [start_elsewhere(tmp_path, f"create-{n}", ANNA) for n in range(4)]
    tokens = [(await trio.to_thread.run_sync(process.communicate))[0].strip() for process in started]
    assert [process.returncode for process in started] == [0] * 4
    async with open_auth(TokenConfig(), context(tmp_path)) as auth:
        assert {owner(auth, token) for token in tokens} == {ANNA.id}


async def test_a_schema_is_brought_up_to_date_by_one_process_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / "noid.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = start_elsewhere(tmp_path, "create", ANNA)
        with trio.fail_after(30):
            while not waits_for_lock(other.pid):  # noqa: ASYNC110  the kernel tells nobody that somebody waits
                await trio.sleep(0.01)
        assert other.poll() is None
    await trio.to_thread.run_sync(other.communicate)
    assert other.returncode == 0


def waits_for_lock(pid: int) -> bool:
    return any(f"-> FLOCK  ADVISORY  WRITE {pid} " in line for line in Path("/proc/locks").read_text().splitlines())


async def test_while_another_process_writes_callers_still_get_in(auth: AuthBackend, tmp_path: Path) -> None:
    token = await auth.create_token(ANNA)
    other = sqlite3.connect(tmp_path / "noid.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting: list[str] = []

    async def create() -> None:
        waiting.append(await auth.create_token(BERT))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(create)
        await trio.testing.wait_all_tasks_blocked()
        assert owner(auth, token) == ANNA.id
        assert not waiting
        other.execute("ROLLBACK")
    assert owner(auth, waiting[0]) == BERT.id
    other.close()


async def test_a_file_that_is_no_database_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "noid.db").write_bytes(b"not a database, surely" * 100)
    with pytest.raises(Damaged, match="not a database"):
        async with open_auth(TokenConfig(), context(tmp_path)):
            pytest.fail("it opened")


async def test_a_table_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    async with open_auth(TokenConfig(), context(tmp_path)):
        pass
    connection = sqlite3.connect(tmp_path / "noid.db")
    Database(connection)["_sqlite_migrations"].insert(
        {"migration_set": "auth_token", "name": "from_the_future", "applied_at": "2030-01-01"}
    )
    connection.close()
    with pytest.raises(Damaged, match="from_the_future"):
        async with open_auth(TokenConfig(), context(tmp_path)):
            pytest.fail("it opened")


async def test_tokens_of_before_there_were_names_allow_all_and_the_newest_is_the_default(tmp_path: Path) -> None:
    old = [f"noid_tok_{n:064x}" for n in range(3)]
    connection = sqlite3.connect(tmp_path / "noid.db")
    db = Database(connection)
    migrations.apply(db, stop_before="named_tokens")
    for n, (token, user) in enumerate(zip(old, (ANNA, ANNA, BERT), strict=True)):
        row = (hash_of(token), user.id, f"2026-01-0{n + 1}T00:00:00.000000+00:00")
        connection.execute("INSERT INTO auth_token_tokens VALUES (?, ?, ?)", row)
    connection.commit()
    connection.close()
    async with open_auth(TokenConfig(), context(tmp_path)) as auth:
        assert [owner(auth, token) for token in old] == [ANNA.id, ANNA.id, BERT.id]
        assert [(info.name, info.scopes) for info in await auth.tokens(ANNA)] == [
            ("default-2", TOKEN_SCOPES),
            ("default", TOKEN_SCOPES),
        ]
        assert [(info.name, info.expires_at) for info in await auth.tokens(BERT)] == [("default", None)]


def test_the_plugin_offers_itself_as_token() -> None:
    assert noid_auth_token.auth_backend().name == "token"
