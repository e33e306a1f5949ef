"""What travels in bodies, queries and paths, as JSON Schema: one module for each subject.

A route says what it takes and answers where it is declared, in words of `noid.server.schemas.vocabulary`::

    Route(
        method="POST", path="/v1/vms/<name>/stop", handler=self.stop, scope=Scope.MANAGE,
        body=optional_json(vms.STOP),                   # or a record, if the body must be there
        query={"wait?": number(0, 300, default=30)},    # a name that ends in ? may be missing
        answers={200: vms.VM_CHANGED},                  # a record, a `Content` of another type, or None for no body
        errors=OPERATION,                               # beyond those every route of its kind has, see below
    )

Summary and description are the handler's docstring. A record is written once, in the module of its subject, and used by
name: it becomes a component of the OpenAPI document, which `noid.server.openapi` makes of the table. A name in a path,
``<name>``, is described in `noid.server.schemas.paths`.

Errors are derived from what the route is: a scope brings 401, 403 and 429, a name in the path 400 and 404, a query 400,
a body 400, 408 and 413, a WebSocket 503, and anything can be 500. To these come the sets of
`noid.server.schemas.failures` for what the route has to do with, ``OPERATION`` or ``GUEST``, and what is its own:
``errors=GUEST | {507}``.

Requests are described as they are checked: what a schema here allows may be refused only for what a schema cannot say,
and what it forbids is refused. Answers have all the fields they are described with and no others; the test that sends
generated requests holds both.
"""
