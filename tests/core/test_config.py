"""server.toml: what may be in it, and how a mistake is told."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from noid.core.config import reading
from noid.core.config.reading import load_admin_config, load_config
from noid.core.config.settings import Config
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
        ("trust_forwarded_for = 1", "trust_forwarded_for is 1; it must be true or false or an array of strings."),
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


# --- other spellings ---------------------------------------------------------------------------------------------


def test_the_sections_of_the_other_manual_are_understood(home: Path) -> None:
    config = load(
        home,
        """
        [server]
        listen = "0.0.0.0:7654"
        timeout = 30000
        workers = 4
        [paths]
        kernel = "/var/lib/noid/vmlinux"
        rootfs = "/var/lib/noid/rootfs.ext4"
        data_dir = "~/.noid"
        [limits]
        max_vms = 100
        max_memory_per_vm = 4096
        max_ws_sessions = 8
        [logging]
        level = "warn" # debug, info, warn, error
        """,
    )
    assert (config.listen, config.exec_timeout_secs, config.max_ws_sessions) == ("0.0.0.0:7654", 30.0, 8)
    assert (config.kernel, config.data_dir) == (Path("/var/lib/noid/vmlinux"), home / ".noid")
    assert (config.limits.max_vms, config.limits.max_memory_per_vm) == (100, 4096)
    assert config.logging.level == "warning"
    (note,) = config.notes
    assert note.startswith("[server] workers = 4 changes nothing: one process serves everything")


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("port = 8080", "127.0.0.1:8080"),
        ("host = '0.0.0.0'", "0.0.0.0:7654"),
        ("[server]\nhost = '::'\nport = 80", "[::]:80"),
        ("[server]\nhost = '[::1]'", "[::1]:7654"),
        ("port = 80\n[server]\nhost = 'example.org'", "example.org:80"),
    ],
)
def test_an_address_may_be_given_as_host_and_port(home: Path, text: str, listen: str) -> None:
    assert load(home, text).listen == listen


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("listen = ':1'\n[server]\nlisten = ':2'", "listen and [server] listen say the same. Leave one of them out."),
        ("listen = ':1'\nport = 2", "port and listen say the same."),
        (
            "[server]\ntimeout = 1\n[limits]\nexec_timeout_secs = 1",
            "[server] timeout and [limits] exec_timeout_secs say",
        ),
        ("port = '80'", "port is '80'; it must be a whole number from 1 to 65535."),
        ("server.port = 65536", "[server] port is 65536; it must be a whole number from 1 to 65535."),
        ("host = 7", "host is 7; it must be an address or a name"),
        ("[server]\ntimeout = 0.5", "[server] timeout is 0.5; it must be a whole number of milliseconds above 0."),
        ("timeout = true", "timeout is True; it must be a whole number of milliseconds"),
        ("server = 3", "server is 3; it must be a section."),
        ("limits = 3", "limits is 3; it must be a section."),
        ("[server]\nlisten = 7654", "listen is 7654; it must be a string."),
        ("[server]\nlisen = 'x'", "server: unknown key 'lisen'. Did you mean 'listen'?"),
        ("[server]\nkernel = '/x'", "server: unknown key 'kernel'. It is kernel."),
        ("[paths]\nmax_vms = 1", "paths: unknown key 'max_vms'. It is [limits] max_vms."),
        ("max_vms = 1", "unknown key 'max_vms'. It is [limits] max_vms."),
        ("max_memory_per_wm = 1", "unknown key 'max_memory_per_wm'. Did you mean [limits] max_memory_per_vm?"),
        ("log_level = 'info'", "unknown key 'log_level'. Did you mean [logging] level?"),
        ("[limits]\nkernel = '/x'", "limits: unknown key 'kernel'. It is kernel."),
        ("[loging]\nlevel = 'info'", "unknown key 'loging'. Did you mean 'logging'?"),
        ("[logging]\nlevel = 'loud'", 'level is \'loud\'; it must be "debug", "info", "warning" or "error".'),
        ("[limits]\nmax_vms = -1", "limits: max_vms is -1; it must be a number of at least 0."),
        ("[limits]\nmax_memory_per_vm = 0", "max_memory_per_vm is 0; it must be a number above 0."),
        ("hook_timeout_secs = 121", "hook_timeout_secs is 121.0; it must be at most 120, so that an operation can end"),
        ("require_unique = 'yes'", 'require_unique is \'yes\'; it must be "report" or "strict".'),
        ("notes = []", "unknown key 'notes'"),
    ],
)
def test_a_mistake_in_another_spelling_is_named_as_it_was_written(home: Path, text: str, says: str) -> None:
    assert says in refusal(home, text)


# --- which file, and whose data ----------------------------------------------------------------------------------


@pytest.fixture
def places(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Every place where a server.toml is looked for, first to last, and no file in them."""
    (home / "here").mkdir()
    monkeypatch.chdir(home / "here")
    monkeypatch.setattr(reading, "SYSTEM_FILE", home / "etc" / "server.toml")
    monkeypatch.setattr(reading, "SYSTEM_DATA_DIR", home / "var")
    found = {"here": home / "here", "home": home / ".noid", "system": home / "etc"}
    for directory in found.values():
        directory.mkdir(exist_ok=True)
    return {name: directory / "server.toml" for name, directory in found.items()}


def test_the_nearest_file_is_taken(home: Path, places: dict[str, Path]) -> None:
    for path in reversed(places.values()):
        path.write_text("boot_timeout_secs = 7")
        found = load_config().source
        assert found is not None
        assert found.absolute() == path
    (home / "data").mkdir()
    assert load_config(data_dir=home / "data").source is None, "whoever names a directory means what is in it"


def test_where_the_data_is_follows_from_the_file(home: Path, places: dict[str, Path]) -> None:
    defaults = {"here": home / ".noid", "home": home / ".noid", "system": home / "var"}
    for name, path in places.items():
        path.write_text("")
        assert load_config(path).data_dir == defaults[name]
        path.write_text("data_dir = 'beside'")
        assert load_config(path).data_dir == path.parent / "beside"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_s_file_means_their_data_whoever_types(places: dict[str, Path]) -> None:
    nobody = pwd.getpwnam("nobody")
    theirs = places["here"]
    theirs.write_text("kernel = '~/vmlinux'\nrootfs = '$HOME/rootfs'")
    os.chown(theirs, nobody.pw_uid, nobody.pw_gid)
    with pytest.raises(ConfigError, match=f"belongs to user id {nobody.pw_uid} .* name it with --config"):
        load_config()
    config = load_config(theirs)
    assert config.data_dir == Path(nobody.pw_dir, ".noid")
    assert (config.kernel, config.rootfs) == (Path(nobody.pw_dir, "vmlinux"), Path(nobody.pw_dir, "rootfs"))


def test_a_file_that_everybody_may_write_is_not_believed(places: dict[str, Path]) -> None:
    places["here"].write_text("")
    places["here"].chmod(0o646)
    with pytest.raises(ConfigError, match=r"mode 646, so somebody else decides"):
        load_config()
    assert load_config(Path("server.toml")).source == Path("server.toml")


def test_under_sudo_nobody_is_given_a_server_by_guessing(
    home: Path, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_UID", "1000")
    places["home"].parent.rmdir()
    with pytest.raises(ConfigError, match=r"^which server is meant\? .* --config, .* --data-dir\.$"):
        load_admin_config()
    assert load_admin_config(data_dir=home / "new").data_dir == home / "new"
    places["system"].write_text("")
    assert load_admin_config().data_dir == home / "var"
