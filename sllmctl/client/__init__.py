"""The typed client of the admin API: what can be asked, described once, and two thin transports that ask it.

`Call` is one request and how its answer is read; the functions of `calls` make them. `AdminClient` (for commands) and
`AsyncAdminClient` (for a dashboard) carry any Call over the manager's unix socket::

    with AdminClient(socket, settings) as admin:
        for model in admin.ask(models()): ...
        for frame in admin.follow(): ...

``follow`` is the event stream: a picture of the cluster, then what changes. Both raise the SllmError that the answer's body
names, and Unreachable when no manager answers.
"""

from __future__ import annotations

from sllmctl.client.calls import (
    Call,
    LogQuery,
    Until,
    Waited,
    add_model,
    apply_models,
    cancel_operation,
    cancel_request,
    checkpoint,
    checkpoints,
    deploy_model,
    drop_checkpoint,
    estimates,
    events,
    explain_model,
    explain_request,
    fetch_checkpoint,
    forget_checkpoint,
    instance,
    instances,
    logs,
    model,
    models,
    node,
    nodes,
    operation,
    operations,
    pin_checkpoint,
    prefetch_checkpoint,
    publish_checkpoint,
    remove_model,
    request,
    requests,
    status,
    stop_instance,
    stop_model,
    verify_checkpoint,
    wait_model,
    wait_operation,
)
from sllmctl.client.transport import AdminClient, AsyncAdminClient

__all__ = [
    "AdminClient",
    "AsyncAdminClient",
    "Call",
    "LogQuery",
    "Until",
    "Waited",
    "add_model",
    "apply_models",
    "cancel_operation",
    "cancel_request",
    "checkpoint",
    "checkpoints",
    "deploy_model",
    "drop_checkpoint",
    "estimates",
    "events",
    "explain_model",
    "explain_request",
    "fetch_checkpoint",
    "forget_checkpoint",
    "instance",
    "instances",
    "logs",
    "model",
    "models",
    "node",
    "nodes",
    "operation",
    "operations",
    "pin_checkpoint",
    "prefetch_checkpoint",
    "publish_checkpoint",
    "remove_model",
    "request",
    "requests",
    "status",
    "stop_instance",
    "stop_model",
    "verify_checkpoint",
    "wait_model",
    "wait_operation",
]
