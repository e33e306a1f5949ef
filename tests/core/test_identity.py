"""What a receipt is worth: the guest writes it, the host decides what it means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from noid.core.guests.identity import EXPECTED, judged, new_identity
from noid.core.model.vms import NetLease, Receipt, ReceiptItem

WHO = new_identity("web", "00000000-0000-4000-8000-000000000000", NetLease(kind="user"))
TRUE = {"hostname": "web", "machine-id": WHO.machine_id, "generation": str(WHO.generation)}


def honest() -> list[ReceiptItem]:
    return [ReceiptItem(name=name, status="done", after=TRUE.get(name, "")) for name in (*EXPECTED, "network")]


def lacking(*items: ReceiptItem) -> dict[str, str]:
    return {item.name: item.status for item in judged(Receipt(items=items), WHO).lacking}


def test_a_guest_that_did_all_it_was_asked_lacks_nothing() -> None:
    assert lacking(*honest()) == {}


@pytest.mark.parametrize("name", [*EXPECTED, "network"])
def test_what_a_guest_does_not_mention_it_has_not_done(name: str) -> None:
    assert lacking(*(item for item in honest() if item.name != name)) == {name: "not_possible"}


@pytest.mark.parametrize("name", TRUE)
def test_what_a_guest_calls_done_and_is_not_has_failed(name: str) -> None:
    assert lacking(*(replace(item, after="x") if item.name == name else item for item in honest())) == {name: "failed"}


def test_a_guest_does_not_decide_what_is_required() -> None:
    items = [replace(item, required=False, status="failed") for item in honest()]
    assert lacking(*items) == {item.name: "failed" for item in items}


def test_one_failure_counts_beside_any_number_of_successes() -> None:
    assert lacking(*honest(), ReceiptItem(name="randomness", status="failed")) == {"randomness": "failed"}


def test_what_only_some_machines_have_is_reported_and_not_required() -> None:
    last = judged(Receipt(items=tuple(honest())), WHO).items[-1]
    assert (last.name, last.status, last.required) == ("vm-generation-id", "not_possible", False)


def test_no_two_wakes_have_one_generation_and_later_ones_have_greater() -> None:
    generations = [new_identity("web", "0" * 32, None).generation for _ in range(2000)]
    assert generations == sorted(set(generations))
