"""noid: virtual machines that can be frozen, forked and woken in milliseconds.

This module holds the version and nothing else, because every command imports it.
"""

__version__ = "0.3.0"
