"""``kernel`` and ``rootfs`` in server.toml, as the predecessor had them, are the image ``default``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from noid.core.config import image as configured_image
from noid.core.config.settings import Config
from noid.core.images import Images
from noid.errors import ConfigError
from noid.testing.simulated_image import add_simulated_image, simulated_files


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(tmp_path / "images", {})


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    files = tmp_path / "files"
    files.mkdir()
    kernel, _, rootfs = simulated_files(files)
    return {"kernel": kernel, "rootfs": rootfs}


def take_up(images: Images, **keys: Any) -> None:
    configured_image.take_up(Config(data_dir=images.directory.parent, **keys), images)


def test_without_these_keys_nothing_is_made(images: Images) -> None:
    take_up(images)
    assert images.names() == []


def test_the_files_become_the_image_once_and_again_when_they_change(images: Images, keys: dict[str, Any]) -> None:
    take_up(images, **keys)
    made = images.get("default")
    take_up(images, **keys)
    assert images.get("default") == made
    with keys["rootfs"].open("r+b") as file:
        file.seek(500_000)
        file.write(b"more")
    take_up(images, **keys)
    assert images.get("default").digest != made.digest


def test_an_image_that_was_built_is_not_replaced(images: Images, keys: dict[str, Any], tmp_path: Path) -> None:
    made = add_simulated_image(images, tmp_path)
    with pytest.raises(ConfigError, match="there is one that was built or imported"):
        take_up(images, **keys)
    assert images.get("default") == made


def test_a_mistake_in_these_keys_is_told_as_one_of_the_configuration(images: Images, keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="kernel and rootfs belong together"):
        take_up(images, kernel=keys["kernel"])
    with pytest.raises(ConfigError, match=r"cannot use /nowhere: No such file"):
        take_up(images, kernel=Path("/nowhere"), rootfs=keys["rootfs"])
    with pytest.raises(ConfigError, match="configuration: "):
        take_up(images, kernel=keys["rootfs"], rootfs=keys["rootfs"])
    assert images.names() == []
