"""The names and labels people give things, and what they may look like."""

from __future__ import annotations

import re
from collections.abc import Mapping

from noid.errors import InvalidRequest

NAME_LENGTH_MAX = 64
LABELS_MAX = 64
CHECKPOINT_LABEL_LENGTH_MAX = 4096
LABEL_VALUE_LENGTH_MAX = 256
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_LABEL_KEY = re.compile(r"[A-Za-z0-9_./-]{1,63}")


def checked_name(name: str, what: str = "VM name") -> str:
    """Return *name* if it is a legal name, 1 to 64 of ``A-Z a-z 0-9 _ - .``, not beginning with ``.`` or ``-``.

    Raises:
        InvalidRequest: says which rule is broken.
    """
    if not name:
        raise InvalidRequest(f"{what} is empty. Give it 1 to {NAME_LENGTH_MAX} characters.")
    if len(name) > NAME_LENGTH_MAX:
        raise InvalidRequest(f"{what} has {len(name)} characters; at most {NAME_LENGTH_MAX} are allowed.")
    if name[0] in ".-":
        raise InvalidRequest(f"{what} {name!r} begins with {name[0]!r}. Begin with a letter, a digit or '_'.")
    if ".." in name:
        raise InvalidRequest(f"{what} {name!r} contains '..', which is not allowed.")
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{what} {name!r} has invalid characters. Allowed are A-Z a-z 0-9 _ - and '.'.")
    return name


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return *labels*, sorted by key, if they are legal: what owners tell their VMs and checkpoints apart by.

    Raises:
        InvalidRequest: too many, a key that is not 1 to 63 of ``A-Z a-z 0-9 _ . / -``, a value too long.
    """
    if len(labels) > LABELS_MAX:
        raise InvalidRequest(f"too many labels: {len(labels)}; at most {LABELS_MAX} are allowed.")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise InvalidRequest(f"label key {key[:80]!r} is not 1 to 63 characters of A-Z a-z 0-9 _ . / and '-'.")
        if len(value) > LABEL_VALUE_LENGTH_MAX:
            raise InvalidRequest(
                f"the value of label {key!r} has {len(value)} characters; at most {LABEL_VALUE_LENGTH_MAX} are allowed."
            )
    return dict(sorted(labels.items()))


def checked_label(label: str | None) -> str | None:
    """Return what is said of a checkpoint, if it is short enough to be in every list of them.

    Raises:
        InvalidRequest: it is not.
    """
    if label is not None and len(label) > CHECKPOINT_LABEL_LENGTH_MAX:
        raise InvalidRequest(
            f"the label has {len(label)} characters; at most {CHECKPOINT_LABEL_LENGTH_MAX} are allowed."
        )
    return label
