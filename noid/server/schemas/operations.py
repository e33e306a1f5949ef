"""Operations: what one is, and what a route that is one takes and answers beside its own."""

from __future__ import annotations

from noid.core.operations.keys import KEY_LENGTH_MAX
from noid.core.operations.outcomes import OperationState
from noid.server.schemas.vms import TIMINGS
from noid.server.schemas.vocabulary import JSON, Content, choice, integer, nullable, record, shape, text

OPERATION_HEADER = "X-Noid-Operation"
KEY_HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotency-Replayed"

_MOMENT = text(about="RFC 3339, UTC.")

OPERATION = record(
    "Operation",
    "A change of a VM or a checkpoint: under way, or what became of it.",
    {
        "id": text(),
        "kind": text(about="`vm.create`, `vm.checkpoint` and so on."),
        "vm": text(about="The name it was asked about."),
        "state": choice(*(state.value for state in OperationState)),
        "step": nullable(text(), about="Where it is, or where it failed."),
        "started_at": _MOMENT,
        "ended_at": nullable(_MOMENT),
        "timings": TIMINGS,
        "error": nullable(shape({"error": text(), "code": text()}), about="Why it failed."),
        "status": nullable(integer(200, 599), about="The status that waiting for it was answered with."),
        "result": nullable({"type": "object"}, about="The body that waiting for it was answered with."),
    },
)

ACCEPTED = Content(
    media={JSON: OPERATION},
    headers={"Location": text(), "Preference-Applied": text(), OPERATION_HEADER: text()},
    text="It goes on, and can be asked about under `Location`.",
)

ASYNCHRONOUS = {
    "Prefer?": text(
        about="`respond-async` is answered with 202 once it has begun; with `, wait=N`, N seconds later (RFC 7240)."
    )
}

EVENTS = Content(
    media={"text/event-stream": {}},
    headers={"Cache-Control": choice("no-store")},
    text="Events as the HTML standard has them: `event` is the kind, `data` JSON with `kind`, `vm`, `at` and `facts`.",
)

KEYED = {
    f"{KEY_HEADER}?": text(
        least=1, most=KEY_LENGTH_MAX, pattern="^[!-~]+$", about="Repeated with the same key, the call is made once."
    )
}
