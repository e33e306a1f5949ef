"""What every list is asked with, and what it is answered with: a part of it, by age or by labels."""

from __future__ import annotations

from collections.abc import Mapping

from noid.core.model.names import LABEL_VALUE_LENGTH_MAX, LABELS_MAX
from noid.core.model.vms import VmState
from noid.server.schemas.vocabulary import JSON, Content, Schema, array, choice, integer, mapping, nullable, text

LIMIT_MAX = 1000

PAGE: Mapping[str, Schema] = {
    "limit?": integer(1, LIMIT_MAX, about="At most so many, and where to find the next; without it, all."),
    "cursor?": text(about="Where to go on: as a `Link` of this list has it."),
}
LABELLED: Mapping[str, Schema] = {
    "label?": array(text(), most=LABELS_MAX, about="`key` or `key=value`. Only what has all of these labels."),
}
IN_STATE: Mapping[str, Schema] = {
    "state?": array(choice(*(state.value for state in VmState)), about="Only what is in one of these states."),
}

LABEL_KEY = text(pattern="^[A-Za-z0-9_./-]{1,63}$")
LABEL_VALUE = text(most=LABEL_VALUE_LENGTH_MAX)
LABELS = mapping(LABEL_VALUE, keys=LABEL_KEY, most=LABELS_MAX, about="Whatever tells it from others.")
LABELS_PATCH = mapping(nullable(LABEL_VALUE), keys=LABEL_KEY, about="Null removes a label; others stay.")


def listed(items: Schema) -> Content:
    """Return the answer that is a list of *items*, or a page of it."""
    link = text(about='`<...>; rel="next"`, the next page, if there is one.')
    return Content(media={JSON: array(items)}, headers={"Link?": link})
