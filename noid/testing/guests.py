"""Guests for tests: a VM that boots in two seconds, made from packages of the host's distribution and cached."""

from __future__ import annotations

from noid.core.guestbuild import distribution_kernel, tiny_rootfs
from noid.core.images import Images
from noid.core.model import Image
from noid.errors import NotFound

TINY = "tiny"


def tiny_image(images: Images) -> Image:
    """Return the image `TINY` of *images*, added if it is not there: the distribution's kernel and busybox. Blocks.

    Its users are ``root`` (the default) and ``noid``; the guest agent is its PID 1.

    Raises:
        DependencyDown: no apt, no network, a missing program; names it, so that a test can skip with these words.
    """
    try:
        return images.get(TINY)
    except NotFound:
        kernel = distribution_kernel()
        return images.add(
            TINY,
            kernel=kernel.vmlinux,
            modules=kernel.modules,
            rootfs=tiny_rootfs(),
            ready=("true",),
            description="busybox, for tests",
        )
