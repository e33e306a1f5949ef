"""``noid-server image``: build, import, list and remove what VMs boot from. Works whether or not the agent runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from noid.server.command import config_options, examples

if TYPE_CHECKING:
    from noid.core.images import Images
    from noid.core.model.images import Image

_SIZE = re.compile(r"(\d+)\s*([MG])(?:i?B)?", re.IGNORECASE)
_UNITS = {"M": 1 << 20, "G": 1 << 30}
_FILE = click.Path(path_type=Path, dir_okay=False)


class Size(click.ParamType[int]):
    """Bytes, written as ``512M`` or ``4G`` (powers of 1024)."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return *value* in bytes."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size. Write it as 512M or 4G.", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


@click.group(epilog=examples("noid-server image build", "noid-server image list"))
def image() -> None:
    """Make, list and remove the images VMs boot from."""


@image.command(
    epilog=examples("noid-server image build", "noid-server image build --name web --packages nginx,git --size 8G")
)
@config_options
@click.option("--name", default="default", show_default=True, help="What to call it.")
@click.option("--size", type=Size(), default="4G", show_default=True, help="How much a guest can store.")
@click.option("--suite", help="The release to install; default: the host's own.")
@click.option("--packages", default="", metavar="A,B", help="What to install beside the default packages.")
@click.option("--tiny", is_flag=True, help="Busybox instead of a distribution; boots in two seconds.")
def build(
    config_path: Path | None, data_dir: Path | None, name: str, size: int, suite: str | None, packages: str, tiny: bool
) -> None:
    """Make an image from the packages of the host's distribution.

    Takes about a minute the first time; a second build of the same is taken from ~/.cache/noid. An image of that name
    is replaced; VMs and checkpoints made from it stay as they are.
    """
    from noid.core.guestbuild import debian_rootfs, distribution_kernel, tiny_rootfs
    from noid.core.model.images import DEFAULT_READY
    from noid.core.model.names import checked_name

    checked_name(name, "image name")
    images = open_images(config_path, data_dir)
    began = time.monotonic()
    kernel = distribution_kernel(printed)
    ready: tuple[str, ...]
    if tiny:
        rootfs, user, ready, description = tiny_rootfs(printed), "root", ("true",), "busybox"
    else:
        extra = [package.strip() for package in packages.split(",") if package.strip()]
        rootfs = debian_rootfs(size_bytes=size, suite=suite, packages=extra, stage=printed)
        user, ready, description = "noid", DEFAULT_READY, " ".join(["made by image build", *extra])
    with printed(f"storing image {name!r}"):
        made = images.add(
            name,
            kernel=kernel.vmlinux,
            modules=kernel.modules,
            rootfs=rootfs,
            user=user,
            ready=ready,
            description=description,
            replace=True,
        )
    click.echo(f"Image '{name}' ({made.digest[:12]}) is ready after {time.monotonic() - began:.1f} s: {made.directory}")


@image.command(
    "import",
    epilog=examples(
        "noid-server image import mine --kernel vmlinux --rootfs root.ext4 \\",
        "    --modules /lib/modules/6.12.0 --user alice",
    ),
)
@config_options
@click.argument("name")
@click.option("--kernel", type=_FILE, required=True, help="ELF vmlinux, bzImage (/boot/vmlinuz-*), or arm64 Image.")
@click.option("--rootfs", type=_FILE, required=True, help="A raw ext4 file system.")
@click.option("--initrd", type=_FILE, help="Unpacked before noid's own, any compression.")
@click.option(
    "--modules",
    type=click.Path(path_type=Path, file_okay=False),
    help="Kernel modules, as /lib/modules/<release>; not needed when virtio is built in.",
)
@click.option(
    "--no-agent", is_flag=True, help="Leave the initrd as it is. Needs the exec backend serial and a shell on ttyS0."
)
@click.option("--user", default="root", show_default=True, help="Who commands run as by default.")
@click.option("--ready", help="The command that ends when the guest has booted; default: systemctl's.")
@click.option("--cmdline", default="", help="Extra kernel arguments.")
@click.option("--description", default="", help="For whoever reads the list.")
@click.option("--replace", is_flag=True, help="Take the place of an image of that name.")
def import_(
    config_path: Path | None,
    data_dir: Path | None,
    name: str,
    kernel: Path,
    rootfs: Path,
    initrd: Path | None,
    modules: Path | None,
    no_agent: bool,
    user: str,
    ready: str | None,
    cmdline: str,
    description: str,
    replace: bool,
) -> None:
    """Make an image from a kernel and a root file system of your own.

    The files are copied. The root file system needs nothing of noid in it: the guest agent comes with the initrd.
    """
    from noid.core.model.images import DEFAULT_READY

    made = open_images(config_path, data_dir).add(
        name,
        kernel=kernel,
        rootfs=rootfs,
        initrd=initrd,
        modules=modules,
        agent=not no_agent,
        user=user,
        ready=DEFAULT_READY if ready is None else tuple(shlex.split(ready)),
        cmdline=cmdline,
        description=description,
        replace=replace,
    )
    click.echo(f"Image '{name}' ({made.digest[:12]}) is ready: Linux {made.kernel_release}, {made.directory}")


@image.command("list", epilog=examples("noid-server image list"))
@config_options
@click.option("--json", "as_json", is_flag=True, help="Everything known about each, as a JSON array.")
def list_(config_path: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """List images: name, digest, kernel, default user, size on disk. A damaged one makes the exit status 1."""
    from noid.errors import Damaged

    images = open_images(config_path, data_dir)
    found: list[Image] = []
    damaged: list[Damaged] = []
    for name in images.names():
        try:
            found.append(images.get(name))
        except Damaged as error:
            damaged.append(error)
    if as_json:
        click.echo(
            json.dumps([{**dataclasses.asdict(one), "disk_bytes": _disk_bytes(one)} for one in found], default=str)
        )
    elif found:
        click.echo(f"{'NAME':<20} {'DIGEST':<12} {'KERNEL':<32} {'USER':<10} {'DISK':>8}  DESCRIPTION")
        for one in found:
            size = f"{_disk_bytes(one) >> 20} MiB"
            row = f"{one.name:<20} {one.digest[:12]:<12} {one.kernel_release:<32} {one.user:<10} {size:>8}"
            click.echo(f"{row}  {one.description}".rstrip())
    elif not damaged:
        click.echo("No images. Make one with 'noid-server image build'.")
    if damaged:
        raise damaged[0]


@image.command(epilog=examples("noid-server image remove old"))
@config_options
@click.argument("name")
def remove(config_path: Path | None, data_dir: Path | None, name: str) -> None:
    """Remove an image. VMs and checkpoints made from it do not need it."""
    open_images(config_path, data_dir).remove(name)
    click.echo(f"Image '{name}' removed.")


def open_images(config_path: Path | None, data_dir: Path | None) -> Images:
    """Return the images of the agent that these options name, with the guest agent of the installed plugins."""
    from noid.core.config.reading import load_admin_config
    from noid.core.images import Images
    from noid.core.plugins import Plugins

    config = load_admin_config(config_path, data_dir=data_dir)
    return Images(config.data_dir / "images", Plugins().initrd_files(platform.machine()))


@contextlib.contextmanager
def printed(what: str) -> Iterator[None]:
    """Print *what* is being done and, when it is done, how long it took."""
    began = time.monotonic()
    click.echo(f"{what} ...", nl=False)
    try:
        yield
    except BaseException:
        click.echo(" failed")
        raise
    click.echo(f" {time.monotonic() - began:.1f} s")


def _disk_bytes(made: Image) -> int:
    return sum(file.stat().st_blocks * 512 for file in (made.kernel, made.initrd, made.rootfs))
