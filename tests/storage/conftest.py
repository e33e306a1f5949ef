"""Filesystems for the tests here: real ext4, btrfs and xfs."""

from noid.testing.loop_filesystem import filesystem

__all__ = ["filesystem"]
