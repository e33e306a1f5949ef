"""Which server is used and with which token; how the config file is written."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from noid.client import settings
from noid.errors import ConfigError, InvalidRequest

URL, OTHER = "https://one.example", "http://two.example:7654"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("NOID_URL", "NOID_TOKEN", "NOID_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def test_with_nothing_configured_it_is_the_local_agent(home: Path) -> None:
    endpoint = settings.choose_endpoint()
    assert endpoint.data_dir == home / ".noid"
    assert endpoint.address == f"unix://{endpoint.socket_path}"


def test_options_win_over_environment_over_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.save_server(URL, "saved")
    assert settings.choose_endpoint().url == URL
    monkeypatch.setenv("NOID_URL", OTHER)
    assert settings.choose_endpoint().url == OTHER
    assert settings.choose_endpoint(server="http://three.example/").url == "http://three.example"
    assert settings.choose_endpoint(local=True).data_dir == home / ".noid"


def test_a_saved_token_never_goes_to_another_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.save_server(URL, "saved")
    assert settings.choose_endpoint(server=f"{URL}/").token == "saved"
    assert settings.choose_endpoint(server=OTHER).token is None
    assert settings.choose_endpoint(server="unix:///x.sock").token is None
    monkeypatch.setenv("NOID_TOKEN", "given")
    assert settings.choose_endpoint(server=OTHER).token == "given"
    assert settings.choose_endpoint().token == "given"
    assert settings.choose_endpoint(local=True).token is None


def test_the_token_is_in_no_repr(home: Path) -> None:
    settings.save_server(URL, "secret")
    assert "secret" not in repr(settings.choose_endpoint())


def test_the_file_is_for_its_owner_alone_and_what_else_it_says_stays(home: Path) -> None:
    path = home / ".noid" / "config.toml"
    path.parent.mkdir()
    path.write_text(
        'theme = "dark"  # mine\n[server] # old\nurl = "http://old"\ntoken = "old"\n\n[aliases]\nl = "list"\n'
    )
    assert settings.save_server(URL, 'a"b\\c') == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert settings.load_server() == (URL, 'a"b\\c')
    text = path.read_text()
    assert 'theme = "dark"  # mine\n' in text
    assert '[aliases]\nl = "list"\n' in text
    assert "old" not in text.replace("# old", "")
    settings.save_server(OTHER, "new")
    assert path.read_text().count("[server]") == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["config.toml"]


def test_a_file_that_cannot_be_edited_safely_is_left_as_it_is(home: Path) -> None:
    path = home / ".noid" / "config.toml"
    path.parent.mkdir()
    path.write_text('server = { url = "http://old", token = "old" }\n')
    with pytest.raises(ConfigError, match=r"cannot be edited safely|is broken"):
        settings.save_server(URL, "new")
    assert settings.load_server() == ("http://old", "old")


@pytest.mark.parametrize(
    "text", ["[server]\n", '[server]\nurl = "http://x"\n', '[server]\nurl = "http://x"\ntoken = 7\n', "server = 1\n"]
)
def test_half_a_server_table_says_what_is_missing(home: Path, text: str) -> None:
    (home / ".noid").mkdir()
    (home / ".noid" / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match="needs two strings, url and token"):
        settings.load_server()


def test_a_file_that_is_no_text_is_named(home: Path) -> None:
    (home / ".noid").mkdir()
    (home / ".noid" / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.toml"):
        settings.load_server()


def test_a_home_that_is_a_file_says_what_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    monkeypatch.setenv("HOME", str(home / "file"))
    with pytest.raises(ConfigError, match="cannot write"):
        settings.save_server(URL, "x")


@pytest.mark.parametrize(
    ("given", "kept"),
    [(" https://x/ ", "https://x"), ("http://x:7654//", "http://x:7654"), ("http://[::1]:1/p/", "http://[::1]:1/p")],
)
def test_a_url_loses_blanks_and_trailing_slashes_and_keeps_its_path(given: str, kept: str) -> None:
    assert settings.normalised_url(given) == kept


@pytest.mark.parametrize("token", ["", "a b", "a\n", "é", "a\x7f"])
def test_a_token_no_header_could_carry_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        settings.checked_token(token)
    assert not token or token not in str(caught.value)
