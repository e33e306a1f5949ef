"""What a VM is made from."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

#: Ends when systemd has finished booting. The agent answers long before systemd can be asked, hence the patience; a
#: guest whose PID 1 is something else is ready at once, one whose PID 1 stays our own init after five seconds.
DEFAULT_READY = (
    "sh",
    "-c",
    "i=0; while [ $i -lt 50 ]; do "
    'case "$(readlink /proc/1/exe)" in */systemd) break;; */init|"") ;; *) exit 0;; esac; '
    "i=$((i+1)); sleep 0.1; done; [ $i -lt 50 ] || exit 0; "
    "until [ -S /run/systemd/private ]; do sleep 0.2; done; "
    "until state=$(systemctl is-system-running --wait 2>/dev/null) || "
    '[ "$state" = degraded ] || [ "$state" = maintenance ]; do sleep 0.5; done',
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A bootable guest: kernel, initrd with the guest agent, ext4 root. All files are immutable once published.

    *digest* identifies the content of all three. *user* is who commands run as when the caller names nobody. *ready*
    is the command that ends when the guest has finished booting; its exit status does not matter, and a guest without
    that program counts as ready once its agent answers. *agent* is whether the initrd has that agent; without it, the
    guest is reached by exec backends that need none.
    """

    name: str
    directory: Path
    kernel: Path
    initrd: Path
    rootfs: Path
    digest: str
    architecture: str = "x86_64"
    kernel_release: str = ""
    cmdline: str = ""
    agent: bool = True
    user: str = "root"
    ready: tuple[str, ...] = DEFAULT_READY
    description: str = ""
    created_at: datetime
