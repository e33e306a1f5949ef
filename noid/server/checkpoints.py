"""The routes of checkpoints that are there: all of a caller's, and each by itself. Taking one: `noid.server.rest`."""

from __future__ import annotations

from quart import Response, request

from noid.core.agent import Agent
from noid.core.database.listing import Wanted, position_of
from noid.core.model.names import checked_name
from noid.core.model.storage import Checkpoint
from noid.core.model.users import Scope
from noid.server.answers import json_reply
from noid.server.interim import still_working
from noid.server.lists import Page, wanted_labels
from noid.server.rest import checkpoint_fields, outcome_reply, read_body
from noid.server.schemas.checkpoints import CHANGE, CHECKPOINT, CHECKPOINT_CHANGED
from noid.server.schemas.lists import LABELLED, PAGE, listed
from noid.server.schemas.paths import NAME
from noid.server.table import Route
from noid.server.visit import current_user


class CheckpointRoutes:
    """``/v1/checkpoints`` and ``/v1/vms/<name>/checkpoints/<checkpoint>``. Its VM may be gone."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        one = "/v1/vms/<name>/checkpoints/<checkpoint>"
        return [
            Route(
                method="GET", path="/v1/checkpoints", handler=self.all,
                query={"vm?": NAME, **LABELLED, **PAGE}, answers={200: listed(CHECKPOINT)},
            ),
            Route(
                method="GET", path="/v1/vms/<name>/checkpoints", handler=self.of_vm,
                query={**LABELLED, **PAGE}, answers={200: listed(CHECKPOINT)},
            ),
            Route(method="GET", path=one, handler=self.one, answers={200: CHECKPOINT}),
            Route(
                method="PATCH", path=one, handler=self.change, scope=Scope.MANAGE, operation=True,
                body=CHANGE, answers={200: CHECKPOINT_CHANGED},
            ),
            Route(
                method="DELETE", path=one, handler=self.delete, scope=Scope.MANAGE, operation=True,
                answers={204: None},
            ),
        ]  # fmt: skip

    async def all(self) -> Response:
        """List the caller's checkpoints, oldest first, also those of VMs that are gone."""
        vm_name = request.args.get("vm")
        page = Page.asked()
        wanted = Wanted(labels=wanted_labels(), vm_name=None if vm_name is None else checked_name(vm_name))
        return _list_reply(page, self._agent.checkpoints.all(current_user(), page.of(wanted)))

    async def of_vm(self, name: str) -> Response:
        """List a VM's checkpoints, oldest first."""
        page = Page.asked()
        wanted = page.of(Wanted(labels=wanted_labels()))
        return _list_reply(page, self._agent.checkpoints.of(current_user(), checked_name(name), wanted))

    async def one(self, name: str, checkpoint: str) -> Response:
        """Show one checkpoint."""
        return json_reply(
            checkpoint_fields(self._agent.checkpoints.one(current_user(), checked_name(name), checkpoint))
        )

    async def change(self, name: str, checkpoint: str) -> Response:
        """Change a checkpoint's label, and its labels by a JSON merge patch."""
        self._agent.checkpoints.one(current_user(), checked_name(name), checkpoint)
        body = await read_body()
        found = self._agent.checkpoints.one(
            current_user(), name, checkpoint
        )  # as it is now: the body may have taken its time
        label = body.optional_text("label") if "label" in body.fields else found.label
        labels = body.labels("labels", may_be_null=True)
        async with still_working():
            outcome = await self._agent.checkpoints.change(current_user(), found, label=label, labels=labels or {})
        return outcome_reply(outcome)

    async def delete(self, name: str, checkpoint: str) -> Response:
        """Delete a checkpoint: 204. What was made from it lives on."""
        found = self._agent.checkpoints.one(current_user(), checked_name(name), checkpoint)
        async with still_working():
            outcome = await self._agent.checkpoints.delete(current_user(), found)
        return outcome_reply(outcome)


def _list_reply(page: Page, checkpoints: list[Checkpoint]) -> Response:
    return page.reply(checkpoints, checkpoint_fields, position_of)
