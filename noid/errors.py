"""What can go wrong, as callers see it: one tree, each class with a stable code and an HTTP status.

::

    NoidError                   500  internal         anything else is a bug
    ├── ConfigError             500  config           a setting, a plugin or the installation; ends the program at start
    ├── InvalidRequest          400  invalid          the request can never succeed as it is
    ├── Unauthenticated         401  unauthenticated
    ├── Denied                  403  denied           a guest's user may not do that to the guest's file
    ├── Forbidden               403  scope            the caller's token does not allow it; names the scope
    ├── QuotaExceeded           403  quota            a user, or the host, has as much as it may; names what
    ├── NotFound                404  not_found        also: not yours
    ├── Conflict                409  conflict
    │   ├── Busy                409  busy             names the operation that holds the VM
    │   ├── OperationCancelled  409  cancelled        somebody asked for it; what had begun is undone
    │   ├── Incompatible        409  incompatible     checkpoint and host differ; names the field
    │   └── LineageEnded        409  lineage          the VM was put back since; its processes are others
    ├── KeyReused               422  idempotency      an Idempotency-Key was used for another request
    ├── TooLarge                413  too_large
    ├── TooManyRequests         429  rate_limited
    ├── BackendError            500  backend          a VMM, storage, exec or network backend failed
    │   └── NotUnique           500  not_unique       a clone could not be made its own, and require_unique is strict
    ├── Damaged                 500  damaged          a checkpoint, image or database is not what was written
    ├── Unsupported             501  unsupported      names the backend and the missing ability
    ├── Unreachable             502  unreachable      nothing in the guest takes connections there
    ├── DependencyDown          503  unavailable      a program, daemon or guest that does not answer
    ├── DeadlineExceeded        504  deadline
    └── NoSpace                 507  no_space

A message says what happened, what is still true, and the next thing to try. Backends never leak foreign exceptions:
they raise one of these with the cause chained.
"""

from __future__ import annotations


class NoidError(Exception):
    """Base of everything noid raises on purpose."""

    code = "internal"
    status = 500


class ConfigError(NoidError):
    """A setting, a plugin or the installation is wrong."""

    code = "config"


class InvalidRequest(NoidError):
    """The request can never succeed as it is."""

    code = "invalid"
    status = 400


class Unauthenticated(NoidError):
    """No credentials, or wrong ones."""

    code = "unauthenticated"
    status = 401


class Denied(NoidError):
    """A user of the guest has no permission for what was asked of the guest's files."""

    code = "denied"
    status = 403


class Forbidden(NoidError):
    """The caller's token is valid and does not allow this."""

    code = "scope"
    status = 403

    def __init__(
        self, scope: str, token: str | None, *, or_else: str = "run noid-server on the server's own machine"
    ) -> None:
        if scope == "admin":
            remedy = f"which no token has: {or_else}"
        else:
            remedy = f"which token {token!r} has not. Use one that has, or make one: `noid-server token create`"
        super().__init__(f"this needs the scope '{scope}', {remedy}.")


class QuotaExceeded(NoidError):
    """A user, or the host, has as much of something as it may. Nothing was changed."""

    code = "quota"
    status = 403


class NotFound(NoidError):
    """There is no such thing, or it belongs to somebody else: callers cannot tell."""

    code = "not_found"
    status = 404


class Conflict(NoidError):
    """The state of the world forbids it now."""

    code = "conflict"
    status = 409


class Busy(Conflict):
    """Another operation holds the VM, or the checkpoint."""

    code = "busy"

    def __init__(self, name: str, holder: str, *, what: str = "VM") -> None:
        super().__init__(f"{what} {name!r} is busy with {holder}. Wait until that has ended and try again.")


class OperationCancelled(Conflict):
    """The operation was cancelled by somebody who may. What it had begun is undone."""

    code = "cancelled"


class Incompatible(Conflict):
    """A checkpoint was taken by something this host does not have. The message names the field that differs."""

    code = "incompatible"


class LineageEnded(Conflict):
    """The VM was put back to a checkpoint: the process, or the log, that was meant is of what it was before."""

    code = "lineage"

    def __init__(
        self,
        what: str = (
            "which ended this process. If it existed at the checkpoint, that copy of it runs on: see `noid ps`."
        ),
    ) -> None:
        super().__init__(f"the VM was put back to a checkpoint since, {what}")


class KeyReused(NoidError):
    """An Idempotency-Key that was used for another request."""

    code = "idempotency"
    status = 422

    def __init__(self) -> None:
        super().__init__(
            "this Idempotency-Key was used for another request within the last day. Use another key for another "
            "request, and repeat a request exactly as it was."
        )


class TooLarge(NoidError):
    """A body or message is over its limit."""

    code = "too_large"
    status = 413


class TooManyRequests(NoidError):
    """Too many attempts from one place, or requests with one token. Says after how many seconds to try again."""

    code = "rate_limited"
    status = 429

    def __init__(self, text: str, retry_after_secs: float = 60.0) -> None:
        super().__init__(text)
        self.retry_after_secs = retry_after_secs


class BackendError(NoidError):
    """A backend failed. The message names the step and carries the backend's own words."""

    code = "backend"


class NotUnique(BackendError):
    """A woken guest is not its own in everything, and ``require_unique`` is strict. Nobody was given it."""

    code = "not_unique"


class Damaged(NoidError):
    """Something on disk is not what noid wrote. The message names the file or field."""

    code = "damaged"


class Unsupported(NoidError):
    """This backend cannot do that, ever."""

    code = "unsupported"
    status = 501

    def __init__(self, backend: str, ability: str, *, remedy: str = "") -> None:
        remedy = remedy or "Choose another backend in server.toml [backends]."
        super().__init__(f"Backend {backend!r} cannot {ability}. {remedy}")


class Unreachable(NoidError):
    """A connection to a guest's port was refused, found no way, or broke off in its middle. The VM is well."""

    code = "unreachable"
    status = 502


class DependencyDown(NoidError):
    """A program is missing or something that should answer does not."""

    code = "unavailable"
    status = 503


class DeadlineExceeded(NoidError):
    """It took longer than it may."""

    code = "deadline"
    status = 504


class NoSpace(NoidError):
    """The disk is full, or would be. Nothing was changed."""

    code = "no_space"
    status = 507
