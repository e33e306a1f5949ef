"""server.toml: what may be in it, and how a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from noid.core.config import Config, load_config
from noid.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory and no environment of the developer's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NOID_DATA_DIR", raising=False)
    return tmp_path


def load(home: Path, text: str) -> Config:
    path = home / "server.toml"
    path.write_text(text)
    return load_config(path)


def refusal(home: Path, text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load(home, text)
    assert str(home / "server.toml") in str(refused.value)
    return str(refused.value)


# --- what may be said --------------------------------------------------------------------------------------------


def test_without_any_file_everything_has_a_default(home: Path) -> None:
    config = load_config()
    assert config.data_dir == home / ".noid"
    assert config.listen == "127.0.0.1:7654"
    assert config.backends.exec == ("vsock",)
    assert config.source is None


def test_the_flat_keys_of_the_predecessor_are_understood(home: Path) -> None:
    config = load(
        home,
        """
        kernel = "/opt/vmlinux"
        rootfs = "~/rootfs.ext4"
        listen = "0.0.0.0:7654"
        data_dir = "$HOME/data"
        max_ws_sessions = 64
        trust_forwarded_for = true
        exec_timeout_secs = 60
        console_timeout_secs = 7200.5
        """,
    )
    assert config.kernel == Path("/opt/vmlinux")
    assert config.rootfs == home / "rootfs.ext4"
    assert config.data_dir == home / "data"
    assert config.max_ws_sessions == 64
    assert config.trust_forwarded_for is True
    assert (config.exec_timeout_secs, config.console_timeout_secs) == (60.0, 7200.5)
    assert isinstance(config.exec_timeout_secs, float)


def test_backends_and_plugin_sections(home: Path) -> None:
    config = load(
        home,
        """
        [backends]
        vmm = "qemu"
        exec = ["vsock", "serial"]
        network = "none"
        [plugins.vmm_qemu]
        machine = "q35"
        """,
    )
    assert (config.backends.vmm, config.backends.storage, config.backends.network) == ("qemu", "auto", "none")
    assert config.backends.exec == ("vsock", "serial")
    assert config.plugins == {"vmm_qemu": {"machine": "q35"}}


def test_one_exec_backend_needs_no_brackets(home: Path) -> None:
    assert load(home, 'backends.exec = "serial"').backends.exec == ("serial",)


# --- where the data is -------------------------------------------------------------------------------------------


def test_an_argument_beats_the_file_which_beats_the_environment_which_beats_home(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home / "server.toml"
    path.write_text('data_dir = "/from/file"')
    assert load_config().data_dir == home / ".noid"
    monkeypatch.setenv("NOID_DATA_DIR", "/from/environment")
    assert load_config().data_dir == Path("/from/environment")
    assert load_config(path).data_dir == Path("/from/file")
    assert load_config(path, data_dir=Path("/from/argument")).data_dir == Path("/from/argument")


def test_the_file_in_the_data_directory_is_read_when_no_other_is_given(home: Path) -> None:
    (home / "data").mkdir()
    (home / "data" / "server.toml").write_text("boot_timeout_secs = 7")
    config = load_config(data_dir=home / "data")
    assert config.boot_timeout_secs == 7.0
    assert config.source == home / "data" / "server.toml"


def test_one_directory_has_one_name_however_it_is_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its VMs are found by that name in their environment."""
    monkeypatch.chdir(home)
    for written in ("data", "./data/", "x/../data", str(home / "data")):
        assert load_config(data_dir=Path(written)).data_dir == home / "data"
        assert load(home, f'data_dir = "{written}"').data_dir == home / "data"


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kernl = 'x'", "unknown key 'kernl'. Did you mean 'kernel'?"),
        ("[backends]\nstorrage = 'x'", "backends: unknown key 'storrage'. Did you mean 'storage'?"),
        ("[bakends]\nvmm = 'x'", "unknown key 'bakends'. Did you mean 'backends'?"),
        ("zzz = 1", "unknown key 'zzz'. Known keys: backends, boot_timeout_secs,"),
        ("local = true", "unknown key 'local'"),
        ("source = 'x'", "unknown key 'source'"),
        ("max_ws_sessions = '32'", "max_ws_sessions is '32'; it must be an integer."),
        ("max_ws_sessions = true", "max_ws_sessions is True; it must be an integer."),
        ("max_ws_sessions = 1.5", "max_ws_sessions is 1.5; it must be an integer."),
        ("max_ws_sessions = 0", "max_ws_sessions is 0; it must be a number above 0."),
        ("trust_forwarded_for = 1", "trust_forwarded_for is 1; it must be true or false."),
        ("exec_timeout_secs = 'soon'", "exec_timeout_secs is 'soon'; it must be a number."),
        ("boot_timeout_secs = -1", "boot_timeout_secs is -1.0; it must be a number above 0."),
        ("wake_timeout_secs = nan", "wake_timeout_secs is nan; it must be a number above 0."),
        ("console_timeout_secs = inf", "console_timeout_secs is inf; it must be a number above 0."),
        ("listen = 7654", "listen is 7654; it must be a string."),
        ("kernel = 5", "kernel is 5; it must be a path in quotes."),
        ("kernel = ''", "kernel is ''; it must be a path in quotes."),
        ("data_dir = 5", "data_dir is 5; it must be a path in quotes."),
        ("rootfs = '~nobody-of-that-name/x'", "there is no such home directory"),
        ("backends = 'qemu'", "backends is 'qemu'; it must be a section."),
        ("backends.exec = ['vsock', 7]", "exec is ['vsock', 7]; it must be an array of strings."),
        ("plugins = 3", "plugins is 3; it must be a section."),
        ("plugins.vmm_qemu = 3", "[plugins] vmm_qemu must be a section: [plugins.vmm_qemu]."),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(home: Path, text: str, says: str) -> None:
    assert says in refusal(home, text)


def test_what_is_not_toml_is_told_with_line_and_column(home: Path) -> None:
    assert "(at line 2, column 10)" in refusal(home, "kernel = '/x'\nrootfs = /y\n")


def test_a_file_that_cannot_be_read_is_named(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*/missing\.toml: No such file"):
        load_config(home / "missing.toml")
    (home / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(home / "binary.toml")
