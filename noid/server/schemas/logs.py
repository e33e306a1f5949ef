"""Logs: bytes numbered from 0, with gaps."""

from __future__ import annotations

from noid.server.schemas.lists import listed
from noid.server.schemas.vocabulary import BYTES, Content, array, boolean, choice, flag, integer, record, shape, text

LOG = record(
    "Log",
    "A log of a VM.",
    {
        "name": text(),
        "bytes": integer(0, about="How many there have ever been."),
        "gaps": array(shape({"start": integer(0), "end": integer(0)}), about="What is no longer kept."),
        "growing": boolean(),
    },
)

_HEADERS = {
    "Accept-Ranges": choice("bytes"),
    "Cache-Control": choice("no-store"),
    "Noid-Log-Gap?": text(about="Gaps in what follows: `65536-262143`, both included."),
}

RESUME = {
    "resume?": flag(about="Say first at which offset it begins, and in which life of the VM."),
    "lineage?": text(about="Refuse (409) if the VM has been put back to a checkpoint since that life of it."),
}
CONSOLE = {
    "history?": integer(0, default=512, about="How many bytes that were printed before are shown first."),
    "offset?": integer(0, about="From which byte of the console's log on, in place of `history`."),
    "readonly?": flag(about="Ignore what the client types."),
    **RESUME,
}
"""The query of a console."""

FOLLOW = {"follow?": flag(about="Go on until the log can grow no more.")}
INFOS = Content(
    media={**listed(LOG).media, BYTES: {}},
    headers={**listed(LOG).headers, **{f"{name.removesuffix('?')}?": said for name, said in _HEADERS.items()}},
    text="The logs, or with `follow` the console's.",
)
STREAM = {"offset?": integer(default=0, about="From where on; negative counts from the end."), **FOLLOW, **RESUME}

READ = Content(media={BYTES: {}}, headers=_HEADERS, text="All that is kept, without gaps.")
READ_PART = Content(media={BYTES: {}}, headers={**_HEADERS, "Content-Range?": text()}, text="The part `Range` names.")
