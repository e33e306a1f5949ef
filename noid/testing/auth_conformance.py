"""What an auth backend must do, as tests: subclass, say how to open it, run. The names are the specification.

::

    class TestMyAuth(AuthConformance):
        @pytest.fixture
        def open_again(self, tmp_path):
            return lambda: open_auth(MyConfig(), AgentContext(data_dir=tmp_path, ...))

*open_again* opens the backend on the same data each time, as an agent and the commands beside it do. Whatever files it
makes are looked for in *place*, which is ``tmp_path``.
"""

# ruff: noqa: D102  the tests' names are their documentation

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path

import pytest
import trio

from noid.core.backends import AuthBackend
from noid.core.model.times import now
from noid.core.model.users import DEFAULT_TOKEN, TOKEN_SCOPES, Credentials, Grant, Scope, User
from noid.errors import Conflict, NotFound, Unauthenticated

ANNA = User(id="user-anna", name="anna", created_at=now())
BERT = User(id="user-bert", name="bert", created_at=now())
HOUR = timedelta(hours=1)


def shown(auth: AuthBackend, token: str | None) -> Grant | None:
    """Return what whoever shows *token* is granted."""
    return auth.authenticate(Credentials(token=token))


class AuthConformance:
    """The contract of `noid.core.backends.AuthBackend`."""

    @pytest.fixture
    def open_again(self) -> Callable[[], AbstractAsyncContextManager[AuthBackend]]:
        raise NotImplementedError("a conformance test's class gives the backend to test")

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        return tmp_path

    @pytest.fixture
    async def auth(
        self, open_again: Callable[[], AbstractAsyncContextManager[AuthBackend]]
    ) -> AsyncIterator[AuthBackend]:
        async with open_again() as auth:
            yield auth

    async def test_a_token_says_whose_it_is_and_allows_everything_for_ever_unless_told_otherwise(
        self, auth: AuthBackend
    ) -> None:
        for user in (ANNA, BERT):
            token = await auth.create_token(user)
            assert shown(auth, token) == Grant(user_id=user.id, token_name=DEFAULT_TOKEN, scopes=TOKEN_SCOPES)

    async def test_nothing_but_the_exact_token_gets_in(self, auth: AuthBackend) -> None:
        token = await auth.create_token(ANNA)
        last = "0" if token[-1] != "0" else "1"
        near = (token[:-1] + last, token[:-1], token + "0", token.upper(), " " + token, token + "\n")
        for wrong in (*near, "", "noid_tok_" + "\xe9" * 64, "noid_tok_" + "\udcff" * 64, "' OR 1 --", None):
            assert shown(auth, wrong) is None
        assert auth.authenticate(Credentials(peer_uid=0)) is None

    async def test_a_token_grants_what_it_was_made_with(self, auth: AuthBackend) -> None:
        end = now() + HOUR
        scopes = frozenset({Scope.READ, Scope.EXEC})
        token = await auth.create_token(ANNA, name="ci", scopes=scopes, expires_at=end)
        assert shown(auth, token) == Grant(user_id=ANNA.id, token_name="ci", scopes=scopes, expires_at=end)  # noqa: S106  # a name

    async def test_an_expired_token_is_worth_nothing_and_its_name_is_free(self, auth: AuthBackend) -> None:
        old = await auth.create_token(ANNA, name="ci", expires_at=now() - HOUR)
        assert shown(auth, old) is None
        assert [info.name for info in await auth.tokens(ANNA)] == ["ci"]
        new = await auth.create_token(ANNA, name="ci")
        assert shown(auth, new) is not None
        assert shown(auth, old) is None
        assert [info.expires_at for info in await auth.tokens(ANNA)] == [None]

    async def test_a_name_is_one_token_of_a_user(self, auth: AuthBackend) -> None:
        first = await auth.create_token(ANNA, name="ci")
        with pytest.raises(Conflict, match="'ci'"):
            await auth.create_token(ANNA, name="ci")
        assert shown(auth, first) is not None
        assert shown(auth, await auth.create_token(BERT, name="ci")) is not None

    async def test_tokens_are_listed_oldest_first_and_without_what_they_are(self, auth: AuthBackend) -> None:
        before = now()
        made = [await auth.create_token(ANNA, name=name, scopes=frozenset({Scope.READ})) for name in ("b", "a")]
        await auth.create_token(BERT)
        infos = await auth.tokens(ANNA)
        assert [(info.name, info.scopes) for info in infos] == [(name, frozenset({Scope.READ})) for name in ("b", "a")]
        assert all(before <= info.created_at <= now() for info in infos)
        assert not any(token in repr(infos) for token in made)

    async def test_one_token_can_be_revoked(self, auth: AuthBackend) -> None:
        kept, gone = [await auth.create_token(ANNA, name=name) for name in ("kept", "gone")]
        of_bert = await auth.create_token(BERT, name="gone")
        await auth.revoke_token(ANNA, "gone")
        with pytest.raises(NotFound, match="'gone'"):
            await auth.revoke_token(ANNA, "gone")
        assert [shown(auth, token) is None for token in (kept, gone, of_bert)] == [False, True, False]

    async def test_all_of_a_user_can_be_revoked_again_and_again(self, auth: AuthBackend) -> None:
        tokens = [await auth.create_token(ANNA, name=name) for name in ("a", "b", "c")]
        of_bert = await auth.create_token(BERT)
        await auth.revoke_tokens(ANNA)
        await auth.revoke_tokens(ANNA)
        assert {shown(auth, token) for token in tokens} == {None}
        assert await auth.tokens(ANNA) == []
        assert shown(auth, of_bert) is not None

    async def test_who_was_revoked_or_has_expired_makes_no_token_any_more(self, auth: AuthBackend) -> None:
        valid = await auth.create_token(ANNA)
        gone, old = (
            await auth.create_token(ANNA, name="gone"),
            await auth.create_token(ANNA, name="old", expires_at=now()),
        )
        of_bert = await auth.create_token(BERT)
        await auth.revoke_token(ANNA, "gone")
        for shown_by_asker in (gone, old, of_bert, "", "nonsense"):
            with pytest.raises(Unauthenticated):
                await auth.create_token(ANNA, name="heir", shown=shown_by_asker)
        assert shown(auth, await auth.create_token(ANNA, name="heir", shown=valid)) is not None

    async def test_a_user_has_no_more_than_the_most_also_when_all_ask_at_once(self, auth: AuthBackend) -> None:
        await auth.create_token(BERT)
        refused = 0

        async def ask(name: str) -> None:
            nonlocal refused
            try:
                await auth.create_token(ANNA, name=name, most=3)
            except Conflict:
                refused += 1

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(ask, f"t{number}")
        assert (refused, len(await auth.tokens(ANNA))) == (5, 3)
        await auth.create_token(ANNA, name="without")

    async def test_what_happens_beside_it_counts_at_once(
        self, auth: AuthBackend, open_again: Callable[[], AbstractAsyncContextManager[AuthBackend]]
    ) -> None:
        async with open_again() as beside:
            made = await beside.create_token(ANNA)
            assert shown(auth, made) is not None
            await beside.revoke_tokens(ANNA)
            assert shown(auth, made) is None

    async def test_tokens_outlive_the_agent(
        self, open_again: Callable[[], AbstractAsyncContextManager[AuthBackend]]
    ) -> None:
        async with open_again() as auth:
            token = await auth.create_token(ANNA, name="ci", scopes=frozenset({Scope.READ}))
            granted = shown(auth, token)
        async with open_again() as auth:
            assert shown(auth, token) == granted

    async def test_a_use_that_is_remembered_is_remembered_by_the_next(
        self, open_again: Callable[[], AbstractAsyncContextManager[AuthBackend]]
    ) -> None:
        async with open_again() as auth:
            token = await auth.create_token(ANNA)
            assert [info.last_used_at for info in await auth.tokens(ANNA)] == [None]
            before = now()
            shown(auth, token)
            (seen,) = [info.last_used_at for info in await auth.tokens(ANNA)]
            await auth.save_uses()
            await auth.save_uses()
        if seen is not None:  # a backend need not keep that
            assert before <= seen <= now()
            async with open_again() as auth:
                assert [info.last_used_at for info in await auth.tokens(ANNA)] == [seen]

    async def test_no_file_holds_a_token_and_only_the_owner_may_read_what_there_is(
        self, auth: AuthBackend, place: Path
    ) -> None:
        token = await auth.create_token(ANNA)
        for path in place.rglob("*"):
            if path.is_file() and path.read_bytes():
                assert token[-64:].encode() not in path.read_bytes()
                assert path.stat().st_mode & 0o077 == 0
