"""Which server is used and with which token."""

from __future__ import annotations

from pathlib import Path

import pytest

from noid.client import servers, settings
from noid.errors import InvalidRequest, NotFound

URL, OTHER = "https://one.example", "http://two.example:7654"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("NOID_URL", "NOID_SERVER", "NOID_TOKEN", "NOID_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def test_with_nothing_configured_it_is_the_local_agent(home: Path) -> None:
    endpoint = settings.choose_endpoint()
    assert endpoint.data_dir == str(home / ".noid")
    assert endpoint.address == f"unix://{endpoint.socket_path}"


def test_options_win_over_environment_over_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.remember(URL, "saved")
    assert settings.choose_endpoint().url == URL
    monkeypatch.setenv("NOID_URL", OTHER)
    assert settings.choose_endpoint().url == OTHER
    assert settings.choose_endpoint(server="http://three.example/").url == "http://three.example"
    assert settings.choose_endpoint(local=True).data_dir == str(home / ".noid")


def test_a_saved_token_never_goes_to_another_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.remember(URL, "saved")
    assert settings.choose_endpoint(server=f"{URL}/").token == "saved"
    assert settings.choose_endpoint(server=OTHER).token is None
    assert settings.choose_endpoint(server="unix:///x.sock").token is None
    monkeypatch.setenv("NOID_TOKEN", "given")
    assert settings.choose_endpoint(server=OTHER).token == "given"
    assert settings.choose_endpoint().token == "given"
    assert settings.choose_endpoint(local=True).token is None


def test_a_server_is_meant_by_its_name_or_its_url(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.remember(URL, "first")
    servers.remember(OTHER, "second", "work")
    for name, meant in (("one.example", (URL, "first")), ("work", (OTHER, "second")), (OTHER, (OTHER, "second"))):
        endpoint = settings.choose_endpoint(server=name)
        assert (endpoint.url, endpoint.token) == meant
        monkeypatch.setenv("NOID_SERVER", name)
        endpoint = settings.choose_endpoint()
        assert (endpoint.url, endpoint.token) == meant
    assert settings.choose_endpoint(server="local").data_dir == str(home / ".noid")
    with pytest.raises(NotFound, match=r"no server is called 'wrok'\. There are: one\.example, work, local"):
        settings.choose_endpoint(server="wrok")


def test_a_server_named_on_the_command_line_never_gets_another_server_s_token(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.remember(URL, "its-own", "work")
    monkeypatch.setenv("NOID_URL", OTHER)
    monkeypatch.setenv("NOID_TOKEN", "of-the-other")
    assert settings.choose_endpoint().token == "of-the-other"
    assert settings.choose_endpoint(server="work").token == "its-own"


def test_the_token_is_in_no_repr(home: Path) -> None:
    servers.remember(URL, "secret")
    assert "secret" not in repr(settings.choose_endpoint())


@pytest.mark.parametrize(
    ("given", "kept"),
    [(" https://x/ ", "https://x"), ("http://x:7654//", "http://x:7654"), ("http://[::1]:1/p/", "http://[::1]:1/p")],
)
def test_a_url_loses_blanks_and_trailing_slashes_and_keeps_its_path(given: str, kept: str) -> None:
    assert servers.normalised_url(given) == kept


@pytest.mark.parametrize("token", ["", "a b", "a\n", "é", "a\x7f"])
def test_a_token_no_header_could_carry_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        servers.checked_token(token)
    assert not token or token not in str(caught.value)
