"""Making what guests are made of: kernels, modules and root filesystems, from the host distribution's own packages.

Everything here blocks and needs no privileges unless it says so.
"""

from noid.core.guestbuild.kernel import Kernel, distribution_kernel
from noid.core.guestbuild.rootfs import debian_rootfs
from noid.core.guestbuild.stages import Stage, silent
from noid.core.guestbuild.tiny import tiny_rootfs

__all__ = ["Kernel", "Stage", "debian_rootfs", "distribution_kernel", "silent", "tiny_rootfs"]
