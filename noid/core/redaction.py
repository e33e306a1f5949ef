"""Tokens that slip into what is written down, such as somebody's who puts theirs where its name belongs: not kept."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"noid_tok_[0-9a-f]{16,}")


def hidden(text: str) -> str:
    """Return *text* without the secret part of any token in it."""
    return _TOKEN.sub("noid_tok_[hidden]", text) if "noid_tok_" in text else text
