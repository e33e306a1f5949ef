"""The servers this user knows: two files, of which the predecessor's client reads and rewrites one."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from noid.client import servers
from noid.errors import ConfigError, Conflict, InvalidRequest, NoidError, NotFound

URL, OTHER = "https://one.example", "http://two.example:7654"


@pytest.fixture
def noid_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NOID_DATA_DIR", raising=False)
    directory = tmp_path / ".noid"
    directory.mkdir()
    return directory


def in_use() -> tuple[str, str] | None:
    current = servers.in_use()
    return None if current is None else (current.url, current.token)


def names() -> list[str]:
    return [server.name for server in servers.known()]


def test_the_file_is_for_its_owner_alone_and_what_else_it_says_stays(noid_dir: Path) -> None:
    path = noid_dir / "config.toml"
    path.write_text(
        'theme = "dark"  # mine\n[server] # old\nurl = "http://old"  # moved\ntoken = "old"\nextra = 1\n\n'
        '[aliases]\nl = "list"\n'
    )
    path.chmod(0o644)
    servers.remember(URL, 'a"b\\c')
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert in_use() == (URL, 'a"b\\c')
    text = path.read_text()
    assert text.startswith('theme = "dark"  # mine\n[server] # old\n')
    assert "# moved" in text
    assert "extra = 1" in text
    assert '[aliases]\nl = "list"\n' in text
    servers.remember(OTHER, "new")
    assert path.read_text().count("[server]") == 1
    assert stat.S_IMODE((noid_dir / "servers.toml").stat().st_mode) == 0o600
    assert sorted(entry.name for entry in noid_dir.iterdir()) == ["config.toml", "servers.toml"]


def test_an_inline_table_is_changed_where_it_is(noid_dir: Path) -> None:
    path = noid_dir / "config.toml"
    path.write_text('server = { url = "http://old", token = "old" }\n')
    servers.remember(URL, "new")
    assert in_use() == (URL, "new")
    assert path.read_text().startswith("server = {")


def test_a_link_stays_a_link(noid_dir: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles" / "noid.toml"
    real.parent.mkdir()
    real.write_text("# kept elsewhere\n")
    (noid_dir / "config.toml").symlink_to(real)
    servers.remember(URL, "new")
    assert (noid_dir / "config.toml").is_symlink()
    assert real.read_text().startswith("# kept elsewhere\n")
    assert in_use() == (URL, "new")


@pytest.mark.parametrize(
    "text", ["[server]\n", '[server]\nurl = "http://x"\n', '[server]\nurl = "http://x"\ntoken = 7\n', "server = 1\n"]
)
def test_half_a_server_table_says_what_is_missing(noid_dir: Path, text: str) -> None:
    (noid_dir / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match="needs two strings, url and token"):
        servers.in_use()


def test_a_file_that_is_no_text_is_named(noid_dir: Path) -> None:
    (noid_dir / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.toml"):
        servers.in_use()


@pytest.mark.parametrize("file", ["config.toml", "servers.toml"])
def test_a_broken_file_is_named_with_line_and_column_and_left_alone(noid_dir: Path, file: str) -> None:
    (noid_dir / file).write_text("# mine\n[server\n")
    with pytest.raises(ConfigError, match=rf"{file} is broken: .*line 2, column 8"):
        servers.remember(URL, "new")
    assert (noid_dir / file).read_text() == "# mine\n[server\n"


def test_a_home_that_is_a_file_says_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NOID_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot write"):
        servers.remember(URL, "x")


def test_a_circle_of_links_is_an_error_of_one_line(noid_dir: Path) -> None:
    (noid_dir / "config.toml").symlink_to("config.toml")
    with pytest.raises(ConfigError, match=r"cannot (read|write) .*config\.toml"):
        servers.remember(URL, "x")


def test_each_server_is_known_by_its_host_or_the_name_it_was_given(noid_dir: Path) -> None:
    servers.remember(URL, "1")
    servers.remember(OTHER, "2", "work")
    servers.remember("http://one.example:8080", "3")
    servers.remember("http://one.example", "4")
    servers.remember("http://[::1]:7654/p", "5")
    assert names() == ["one.example", "work", "one.example-8080", "one.example-2", "1"]
    assert in_use() == ("http://[::1]:7654/p", "5")


def test_a_new_token_takes_the_place_of_the_old_one_of_that_url(noid_dir: Path) -> None:
    servers.remember(URL, "old", "work")
    servers.remember(URL + "/", "new")
    assert [(each.name, each.token) for each in servers.known()] == [("work", "new")]


def test_one_server_can_be_known_as_two_users(noid_dir: Path) -> None:
    servers.remember(URL, "alice's", "alice")
    servers.remember(URL, "bob's", "bob")
    assert names() == ["alice", "bob"]
    servers.remember(URL, "bob's new one".replace(" ", "-"))
    assert [each.token for each in servers.known()] == ["alice's", "bob's-new-one"]
    servers.switch("local")
    with pytest.raises(InvalidRequest, match="known under several names: alice, bob"):
        servers.remember(URL, "whose")
    with pytest.raises(InvalidRequest, match="alice, bob"):
        servers.with_url(URL)


def test_a_name_that_is_another_server_s_is_refused_and_changes_nothing(noid_dir: Path) -> None:
    servers.remember(URL, "1", "work")
    before = (noid_dir / "servers.toml").read_text()
    with pytest.raises(Conflict, match=r"already the name of https://one\.example"):
        servers.remember(OTHER, "2", "work")
    assert (in_use(), (noid_dir / "servers.toml").read_text()) == ((URL, "1"), before)


@pytest.mark.parametrize("name", ["local", "", "a b", "-x", "http://x", "ä", "x" * 65])
def test_what_can_be_mistaken_for_something_else_is_no_name(noid_dir: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        servers.checked_server_name(name)


def test_one_switches_to_and_fro_and_to_this_machine(noid_dir: Path) -> None:
    servers.remember(URL, "1", "a")
    servers.remember(OTHER, "2", "b")
    servers.switch("a")
    assert in_use() == (URL, "1")
    servers.switch("local")
    assert in_use() is None
    assert names() == ["a", "b"]
    servers.switch("b")
    assert in_use() == (OTHER, "2")
    with pytest.raises(NotFound, match="There are: a, b, local"):
        servers.switch("c")


def test_what_the_predecessor_s_client_wrote_is_kept_when_another_server_takes_its_place(noid_dir: Path) -> None:
    servers.remember(OTHER, "2", "b")
    (noid_dir / "config.toml").write_text(f'[server]\nurl = "{URL}"\ntoken = "theirs"\n')  # all else is lost in it
    assert names() == ["b", "one.example"]
    servers.switch("b")
    servers.switch("one.example")
    assert in_use() == (URL, "theirs")


def test_a_server_is_forgotten_with_its_token_everywhere(noid_dir: Path) -> None:
    servers.remember(URL, "first-token", "a")
    servers.remember(OTHER, "second-token", "b")
    assert servers.forget("a") is False
    assert in_use() == (OTHER, "second-token")
    assert servers.forget("b") is True
    assert in_use() is None
    assert "token" not in (noid_dir / "config.toml").read_text() + (noid_dir / "servers.toml").read_text()
    with pytest.raises(NotFound):
        servers.forget("b")


def test_a_file_others_can_read_is_noticed(noid_dir: Path) -> None:
    servers.remember(URL, "1")
    assert servers.exposed() == []
    (noid_dir / "config.toml").chmod(0o640)
    assert servers.exposed() == [noid_dir / "config.toml"]


def test_of_many_that_are_set_up_at_once_none_is_lost(noid_dir: Path) -> None:
    problems: list[NoidError] = []

    def set_up(number: int) -> None:
        try:
            servers.remember(f"http://host-{number}", str(number))
        except NoidError as error:
            problems.append(error)

    threads = [threading.Thread(target=set_up, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert problems == []
    assert sorted(names()) == [f"host-{number}" for number in range(8)]
