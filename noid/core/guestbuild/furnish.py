"""Turns a bare Debian or Ubuntu tree into the default guest: one user, one console, nothing that slows the boot."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from noid.core.guestbuild.aptsources import Source
from noid.errors import BackendError

USER = "noid"
USER_ID = 1000
_HOSTNAME = "noid"

# What a guest that is frozen, forked and woken does not need, or what it would only spend its boot with.
_MASKED = (
    # the network is configured by noid's agent, and networkd would flush what it set
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-networkd-wait-online.service",
    "systemd-resolved.service",
    # the agent sets the clock when the guest wakes
    "systemd-timesyncd.service",
    # work by the calendar: it would start in every clone at once
    "apt-daily.service",
    "apt-daily.timer",
    "apt-daily-upgrade.service",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "logrotate.timer",
    "man-db.timer",
    "motd-news.timer",
    "systemd-tmpfiles-clean.timer",
    # consoles there are none of: noid-console.service has the serial one
    "getty@.service",
    "getty-static.service",
    "serial-getty@.service",
    "console-getty.service",
    "console-setup.service",
    "keyboard-setup.service",
    # bookkeeping of boots, of which a golden template has one
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-journal-flush.service",
    "systemd-random-seed.service",
    "systemd-pstore.service",
    "systemd-machine-id-commit.service",
    "systemd-remount-fs.service",
    # modules and mounts this kernel has built in, or nobody asked for
    "kmod-static-nodes.service",
    "systemd-modules-load.service",
    "modprobe@.service",
    "systemd-binfmt.service",
    "proc-sys-fs-binfmt_misc.automount",
    "dev-hugepages.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "sys-fs-fuse-connections.mount",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
)

_CONSOLE_UNIT = f"""\
# The serial console: logged in as {USER}. Unlike serial-getty@ it does not wait for udev to find the port.
[Unit]
Description=Console on ttyS0
After=systemd-user-sessions.service
ConditionPathExists=/dev/ttyS0

[Service]
ExecStart=-/sbin/agetty --autologin {USER} --noissue --keep-baud 115200,57600,38400,9600 ttyS0 vt220
Restart=always
RestartSec=0
UtmpIdentifier=ttyS0
StandardInput=tty
StandardOutput=tty
TTYPath=/dev/ttyS0
TTYReset=yes
TTYVHangup=yes
IgnoreSIGPIPE=no
SendSIGHUP=yes

[Install]
WantedBy=multi-user.target
"""

# Debian makes host keys when the package is installed, and those are not for an image. sshd does not start without.
_SSH_KEYS_UNIT = """\
[Unit]
Description=SSH host keys where there are none
Before=ssh.service ssh.socket
ConditionPathExistsGlob=!/etc/ssh/ssh_host_*_key

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key
"""

_FILES = {
    "etc/hostname": f"{_HOSTNAME}\n",
    "etc/hosts": f"127.0.0.1\tlocalhost\n127.0.1.1\t{_HOSTNAME}\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    "etc/resolv.conf": "nameserver 10.0.2.3\n",  # QEMU's user-mode network answers there
    "etc/fstab": "# The root is mounted by noid's init before systemd starts.\n",
    "etc/default/locale": "LANG=C.UTF-8\n",
    "etc/systemd/system/noid-console.service": _CONSOLE_UNIT,
    # memory survives a checkpoint, so the journal need not be written to the disk to survive one
    "etc/systemd/journald.conf.d/noid.conf": "[Journal]\nStorage=volatile\nRuntimeMaxUse=16M\n",
    "etc/systemd/system.conf.d/noid.conf": "[Manager]\nDefaultTimeoutStopSec=10s\n",
    # blank, so that each guest gets its own; systemd takes the second one for the first if it may
    "etc/machine-id": "",
    "home/noid/.hushlogin": "",
}
_SUDOERS = f"{USER} ALL=(ALL:ALL) NOPASSWD: ALL\n"
_GONE = (
    "etc/apt/sources.list",
    "etc/apt/apt.conf.d/99mmdebstrap",
    "var/lib/dbus/machine-id",
    "var/lib/systemd/random-seed",
)
_EMPTIED = ("etc/apt/sources.list.d", "var/cache/apt", "var/lib/apt/lists", "var/log", "tmp", "var/tmp", "run")


def furnish(tree: Path, sources: Sequence[Source], apt_options: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Change *tree* in place.

    Returns:
        User and group ids of what was added and does not belong to root, by path.

    Raises:
        BackendError: the tree has a user with our name or number already.
    """
    for name in _GONE:
        (tree / name).unlink(missing_ok=True)
    for name in _EMPTIED:
        _empty(tree / name)
    for key in (tree / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    _add_user(tree)
    for name, text in _FILES.items():
        _write(tree, name, text)
    _write(tree, f"etc/sudoers.d/{USER}", _SUDOERS, mode=0o440)
    _write(tree, "etc/apt/sources.list", "".join(f"{s.line(_keyring(tree))}\n" for s in sources))
    if apt_options:
        _write(tree, "etc/apt/apt.conf.d/80noid-host", "\n".join(apt_options) + "\n")
    _quiet_terminal(tree)
    _mask(tree)
    if (tree / "usr/sbin/sshd").exists():
        _own_ssh_keys(tree)
    home = f"home/{USER}"
    for skeleton in (tree / "etc/skel").iterdir():
        shutil.copy(skeleton, tree / home / skeleton.name)
    inside = [home, *(f"{home}/{path.name}" for path in (tree / home).iterdir())]
    return dict.fromkeys(inside, (USER_ID, USER_ID))


def _write(tree: Path, name: str, text: str, mode: int = 0o644) -> None:
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # resolv.conf may be a link that leads out of the tree
    path.write_text(text)
    path.chmod(mode)


def _empty(directory: Path) -> None:
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _add_user(tree: Path) -> None:
    for name, line in (
        ("passwd", f"{USER}:x:{USER_ID}:{USER_ID}:{USER}:/home/{USER}:/bin/bash"),
        ("group", f"{USER}:x:{USER_ID}:"),
        ("shadow", f"{USER}:*:19000:0:99999:7:::"),  # no password opens it: the console logs in by itself
        ("gshadow", f"{USER}:!::"),
    ):
        path = tree / "etc" / name
        text = path.read_text()
        for existing in text.splitlines():
            fields = existing.split(":")
            if fields[0] == USER or (name in ("passwd", "group") and fields[2] == str(USER_ID)):
                raise BackendError(f"the guest's /etc/{name} has {existing!r} already, where user {USER} should go.")
        mode = path.stat().st_mode
        path.write_text(f"{text}{line}\n")
        path.chmod(mode)
    (tree / "home" / USER).mkdir(mode=0o755)


def _keyring(tree: Path) -> str | None:
    """Return the distribution's own keys, where they are inside the guest; None leaves it to apt's trusted keys."""
    names = [f"usr/share/keyrings/{d}-archive-keyring.{e}" for d in ("debian", "ubuntu") for e in ("gpg", "pgp")]
    return next((f"/{name}" for name in names if (tree / name).is_file()), None)


def _quiet_terminal(tree: Path) -> None:
    """Bracketed paste writes escapes into every prompt, which whoever reads a console by program must filter."""
    path = tree / "etc/inputrc"
    text = path.read_text() if path.is_file() else ""
    _write(tree, "etc/inputrc", f"{text}set enable-bracketed-paste off\n")
    _empty(tree / "etc/update-motd.d")
    _write(tree, "etc/motd", "")


def _own_ssh_keys(tree: Path) -> None:
    """Let each VM have host keys of its own. One type, because making an RSA key takes seconds under emulation."""
    _write(tree, "etc/noid/ssh-host-keys", "ed25519\n")
    _write(tree, "etc/systemd/system/noid-ssh-keys.service", _SSH_KEYS_UNIT)
    for unit in ("ssh.service", "ssh.socket"):
        wants = tree / f"etc/systemd/system/{unit}.wants"
        wants.mkdir(exist_ok=True)
        (wants / "noid-ssh-keys.service").symlink_to("/etc/systemd/system/noid-ssh-keys.service")


def _mask(tree: Path) -> None:
    units = tree / "etc/systemd/system"
    for name in _MASKED:
        path = units / name
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/null")
    for name in ("etc/.updated", "var/.updated"):  # the tree is fresh: no first-boot updates, which look at these dates
        _write(tree, name, "")
    default = units / "default.target"
    default.unlink(missing_ok=True)
    default.symlink_to("/lib/systemd/system/multi-user.target")
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "noid-console.service").symlink_to("/etc/systemd/system/noid-console.service")
