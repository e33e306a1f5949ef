"""Which checkpoint is meant: by its id, a beginning of it that only one has, or its label.

A whole id of a VM that is named needs no question, so scripts that pass ids make the requests they always made.
Anything else is looked for among the VM's checkpoints, or among all of the caller's where no VM is named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from noid.cli.options import call
from noid.cli.output import printable
from noid.client.answers import CheckpointInfo
from noid.client.calls import checkpoints as calls
from noid.client.calls import vms
from noid.client.errors import ServerError, ServerTooOld
from noid.errors import InvalidRequest, NotFound

PREFIX_DIGITS_MIN = 4
SHOWN_MAX = 10
_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)
_PREFIX = re.compile(rf"[0-9a-f]{{{PREFIX_DIGITS_MIN},16}}", re.ASCII)
_NOT_FOUND = 404


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A checkpoint as the server wants it named: by VM and id. *label* is not known where nobody had to ask."""

    vm: str
    id: str
    label: str | None = None

    def __str__(self) -> str:
        label = "" if self.label is None else f" ({printable(self.label)})"
        return f"'{self.id}'{label} of VM '{self.vm}'"


def is_id(text: str) -> bool:
    """Return whether *text* is a whole id."""
    return _ID.fullmatch(text) is not None


@dataclass(slots=True)
class Checkpoints:
    """The caller's checkpoints, asked for when a text cannot be understood without them, and then once."""

    _known: dict[str | None, list[CheckpointInfo]] = field(default_factory=dict)

    def of(self, vm: str | None) -> list[CheckpointInfo]:
        """Return the checkpoints of *vm*, or all, oldest first.

        Raises:
            ServerError: there is no such VM, and no checkpoint of one.
        """
        if vm not in self._known:
            self._known[vm] = _all() if vm is None else call().perform(calls.of_vm(vm))
        return self._known[vm]

    def meant(self, text: str, vm: str | None) -> Chosen:
        """Return the checkpoint of *vm* that *text* means; without a VM, of any, where ``VM/TEXT`` names one, too.

        Raises:
            NotFound: there is none.
            InvalidRequest: there are several; they are listed.
            ServerError: there is no such VM.
        """
        if vm is not None:
            return Chosen(vm=vm, id=text) if is_id(text) else self._found(text, vm)
        head, slash, rest = text.partition("/")
        if slash and head and rest:
            try:
                return self.meant(rest, head)
            except ServerError as error:
                if error.status != _NOT_FOUND:
                    raise
            except NotFound:
                pass  # it may be a label with a slash in it
        return self._found(text, None)

    def _found(self, text: str, vm: str | None) -> Chosen:
        fitting = [each for each in self.of(vm) if _fits(each, text)]
        whose = "you have" if vm is None else f"VM {vm!r} has"
        if not fitting:
            raise NotFound(
                f"checkpoint {text!r} not found: {whose} none with that id, an id that begins so ({PREFIX_DIGITS_MIN} "
                "digits or more), or that label"
            )
        if len(fitting) > 1:
            shown = [_described(each) for each in fitting[-SHOWN_MAX:]]
            more = [f"and {len(fitting) - SHOWN_MAX} older ones"] if len(fitting) > SHOWN_MAX else []
            raise InvalidRequest(
                f"{text!r} may be {len(fitting)} checkpoints: {'; '.join(shown + more)}. Say which by its id."
            )
        [one] = fitting
        return Chosen(vm=one["vm_name"], id=one["id"], label=one["label"])


def _fits(checkpoint: CheckpointInfo, text: str) -> bool:
    return checkpoint["label"] == text or (_PREFIX.fullmatch(text) is not None and checkpoint["id"].startswith(text))


def _described(checkpoint: CheckpointInfo) -> str:
    label = "" if checkpoint["label"] is None else f" ({printable(checkpoint['label'][:40])})"
    return f"{checkpoint['id']}{label} of {checkpoint['vm_name']}, {checkpoint['created_at']}"


def _all() -> list[CheckpointInfo]:
    try:
        return call().perform(calls.every())
    except ServerTooOld:
        pass  # it can only be asked VM by VM
    return [each for vm in call().perform(vms.every()) for each in call().perform(calls.of_vm(vm["name"]))]
