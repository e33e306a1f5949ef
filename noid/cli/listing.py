"""``noid list``: the command typed most often, apart so that it imports nothing of what makes VMs."""

from __future__ import annotations

from noid.cli.options import call, command, with_labels
from noid.cli.output import show, table
from noid.client.answers import VmInfo
from noid.client.calls import vms


@command("list", examples="noid list\nnoid list --label tier=front\nnoid list -q --label noid.run")
@with_labels("Only those with this label; may be repeated.", "KEY[=VALUE]")
def list_(labels: tuple[str, ...]) -> None:
    """Show your VMs."""
    found = call().perform(vms.every(labels))
    if labels:
        from noid.cli.labels import labelled

        found = labelled(found)
    header = ("name", "state", "cpus", "mem (MiB)", "created")
    rows = [[vm["name"], _shown_state(vm), str(vm["cpus"]), str(vm["mem_mib"]), vm["created_at"]] for vm in found]
    show(found, table(header, rows) if rows else "No VMs found.", brief="\n".join(vm["name"] for vm in found))


def _shown_state(vm: VmInfo) -> str:
    return f"{vm['state']} (silent)" if vm.get("responding") is False else vm["state"]
