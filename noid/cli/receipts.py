"""What a woken VM's receipt says, for people: a line for each thing it may still share with its twins."""

from __future__ import annotations

from noid.cli.output import printable
from noid.client.answers import ReceiptItem, VmInfo


def lacking_lines(vm: VmInfo) -> list[str]:
    """Return a line for each required item that is not done."""
    return [_line(item) for item in vm.get("receipt") or () if item.get("required", True) and item["status"] != "done"]


def summary(vm: VmInfo) -> str:
    """Return in a few words whether the VM is its own; ``-`` where nobody says so."""
    items = vm.get("receipt") or ()
    if not items:
        return "-"
    done = sum(item["status"] == "done" for item in items)
    return f"{done} of {len(items)} items done" + ("" if lacking_lines(vm) else ", all that are required")


def _line(item: ReceiptItem) -> str:
    words = f"Not its own: {item['name']} {item['status'].replace('_', ' ')}"
    return printable(f"{words}: {item['detail']}" if item["detail"] else words)
