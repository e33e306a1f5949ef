"""A guest's files: what one is, and what a PUT has written."""

from __future__ import annotations

from noid.server.schemas.vocabulary import BYTES, JSON, Content, array, choice, integer, nullable, record, text

TAR = "application/x-tar"

FILE = record(
    "File",
    "What a path of the guest is. `missing` has no other fields.",
    {
        "kind": text(about="`file`, `directory`, `missing` or what else there is."),
        "size?": integer(0),
        "allocated_bytes?": integer(0),
        "mode?": text(pattern="^[0-7]{4,}$"),
        "mtime_ns?": integer(),
        "sha256?": text(pattern="^[0-9a-f]{64}$", about="If it was asked for."),
    },
)

WRITTEN = record(
    "Written",
    "What was written.",
    {
        "size": integer(0),
        "entries": integer(0),
        "sha256": nullable(text()),
        "left_out": array(text(), about="A line for each thing that is not there now."),
    },
)

_ABOUT = {"X-Noid-File?": text(about="A `File` as JSON."), "ETag?": text(), "Accept-Ranges?": choice("bytes")}

READ = Content(
    media={BYTES: {}, TAR: {}, JSON: FILE},
    headers={**_ABOUT, "Repr-Digest?": text()},
    text="A file's bytes; a tar stream of a directory, or of anything with `Accept: application/x-tar`; with "
    "`Accept: application/json` what the path is.",
)
READ_PART = Content(media={BYTES: {}}, headers={**_ABOUT, "Content-Range": text()}, text="The part `Range` names.")

UPLOAD = Content(media={BYTES: {}, TAR: {}}, text="A file's bytes, or a tree.")

_WHERE = {
    "path": text(least=1, about="Of the guest; percent-encoded bytes. A relative one begins in the user's home."),
    "user?": text(about="As whom; the image's user if missing."),
}
FROM = {
    **_WHERE,
    "sum?": text(about="1: tell the SHA-256 too, where only asked what the path is."),
    "length?": text(pattern="^[0-9]{1,18}$", about="Of how many bytes."),
}
INTO = {
    **_WHERE,
    "offset?": text(pattern="^[0-9]{1,18}$", about="Go on after that many bytes of a part that was left."),
    "mode?": text(pattern="^[0-7]{1,4}$"),
    "mtime_ns?": text(pattern="^-?[0-9]{1,18}$"),
    "owners?": text(about="1: restore owners, where the user is root."),
}
