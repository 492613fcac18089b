"""`sllmctl model`: add, deploy, scale, stop, remove; and what there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from sllmctl.cli import completion
from sllmctl.cli.context import Invocation, Real, output_option, pass_invocation, timeout_option, yes_option
from sllmctl.cli.logs import log_options, show_logs
from sllmctl.cli.output import Format, show_documents, show_item
from sllmctl.cli.watch import list_items, watch_option

if TYPE_CHECKING:
    from schema.spec import ScaleSpec, Source
    from sllmctl.cli.waiting import Patience
    from sllmctl.client import Call, Until

__all__ = ["command"]

F = TypeVar("F", bound=Callable[..., Any])


@click.group("model")
def command() -> None:
    """Models: add, deploy, scale, stop, remove."""


class _KeepAlive(Real):
    """Seconds, or "auto", which is kept as it is: None is what was not given."""

    name = "number of seconds, nor auto"

    def __init__(self) -> None:
        super().__init__(0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


def _scale_options(function: F) -> F:
    options = (
        click.option("--min", "min_instances", type=click.IntRange(0), help="Instances kept at least; 0 scales to zero."),
        click.option("--max", "max_instances", type=click.IntRange(1), help="Instances at most."),
        click.option(
            "--keep-alive",
            type=_KeepAlive(),
            metavar="SECONDS|auto",
            help="How long the last instance stays idle; auto makes it of what a reload would take.",
        ),
        click.option("--concurrency", type=click.IntRange(1), help="Sequences that run on one instance at once."),
        click.option("--queue-limit", type=click.IntRange(0), help="Requests that may wait."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _wait_options(function: F) -> F:
    return click.option("--wait", is_flag=True, help="Return when it is done.")(timeout_option(function))


@command.command("add")
@click.argument("name")
@click.argument("source")
@click.option("--in-place", is_flag=True, help="Load a directory's safetensors files where they lie; make no copy.")
@click.option("--deploy", is_flag=True, help="Serve it as soon as it has been ingested, and return then.")
@_scale_options
@click.option("--devices", type=click.IntRange(1), help="Devices that one instance spans.")
@click.option("--kv-size", metavar="SIZE", help="Memory of an instance's KV cache, as in 512MiB.")
@click.option("--max-context", type=click.IntRange(8), metavar="TOKENS", help="A shorter context than the model's own.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of an instance on a CPU.")
@click.option("--deterministic", is_flag=True, help="The same bits in any batch and after any migration, at a lower speed.")
@click.option("--cold-start-timeout", type=Real(0), metavar="SECONDS", help="How long a request waits for a start.")
@_wait_options
@pass_invocation
def add(
    invocation: Invocation,
    /,
    name: str,
    source: str,
    in_place: bool,
    deploy: bool,
    devices: int | None,
    kv_size: str | None,
    max_context: int | None,
    threads: int | None,
    deterministic: bool,
    cold_start_timeout: float | None,
    wait: bool,
    timeout: float | None,
    **scale: Any,
) -> None:
    """Add a model under NAME and ingest its SOURCE.

    SOURCE is a Hugging Face directory on this machine (PATH), one on a node (NODE:/PATH), one behind a web server
    (https://HOST/PATH), or a model of the hub (ORG/NAME, or ORG/NAME@REVISION).

    \b
    Examples:
      sllmctl model add tiny ./my-model --deploy --wait
      sllmctl model add qwen gpu1:/models/Qwen3-0.6B --min 1
      sllmctl model add qwen gpu1:/models/Qwen3-0.6B --in-place
    """
    import msgspec

    from schema.spec import ScaleSpec, parse_spec
    from sllmctl import client
    from sllmctl.cli.diagnostics import note
    from sllmctl.cli.waiting import wait_for

    engine = {
        "kv_bytes": _bytes(kv_size),
        "max_context_tokens": max_context,
        "threads": threads,
        "deterministic": deterministic or None,
    }
    given = {
        "name": name,
        "source": msgspec.to_builtins(_source(source, in_place)),
        "devices": devices,
        "scale": msgspec.to_builtins(_changed(ScaleSpec(), _given_scale(scale))),
        "engine": {key: value for key, value in engine.items() if value is not None},
        "cold_start_timeout_s": cold_start_timeout,
    }
    spec = parse_spec({key: value for key, value in given.items() if value is not None})
    patience = invocation.patience(timeout)
    with invocation.admin(patience) as admin:
        admin.ask(client.add_model(spec, deploy=deploy))
        if wait or deploy:
            wait_for(admin, name, "ready" if wait and deploy else "ingested", patience)
    done = "deployed" if deploy else "added" if wait else f"being ingested; see `sllmctl model show {name}`"
    note(f"model {name} is {done}")


@command.command("deploy")
@click.argument("name", shell_complete=completion.names("model"))
@_scale_options
@_wait_options
@pass_invocation
def deploy(invocation: Invocation, /, name: str, wait: bool, timeout: float | None, **scale: Any) -> None:
    """Serve a model that has been ingested.

    \b
    Examples:
      sllmctl model deploy qwen --wait
      sllmctl model deploy qwen --min 1 --max 4
    """
    from sllmctl import client
    from sllmctl.cli.diagnostics import note
    from sllmctl.cli.waiting import wait_for

    patience = invocation.patience(timeout)
    with invocation.admin(patience) as admin:
        changed = _given_scale(scale)
        admin.ask(client.deploy_model(name, _changed(admin.ask(client.model(name)).spec.scale, changed) if changed else None))
        if wait:
            wait_for(admin, name, "ready", patience)
    note(f"model {name} is deployed")


@command.command("scale")
@click.argument("name", shell_complete=completion.names("model"))
@_scale_options
@_wait_options
@pass_invocation
def scale(invocation: Invocation, /, name: str, wait: bool, timeout: float | None, **scale: Any) -> None:
    """Change how a deployed model is scaled; what is not given stays.

    \b
    Examples:
      sllmctl model scale qwen --max 4
      sllmctl model scale qwen --min 0 --keep-alive auto
    """
    from schema.errors import Conflict
    from sllmctl import client
    from sllmctl.cli.diagnostics import note
    from sllmctl.cli.waiting import wait_for

    changed = _given_scale(scale)
    if not changed:
        raise click.UsageError("say what to change: --min, --max, --keep-alive, --concurrency or --queue-limit")
    patience = invocation.patience(timeout)
    with invocation.admin(patience) as admin:
        view = admin.ask(client.model(name))
        if view.state != "deployed":
            raise Conflict(f"model {name} is {view.state}, not deployed; `sllmctl model deploy {name}` takes the same options")
        admin.ask(client.deploy_model(name, _changed(view.spec.scale, changed)))
        if wait:
            wait_for(admin, name, "ready", patience)
    note(f"model {name} is scaled")


@command.command("stop")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completion.names("model"))
@yes_option
@_wait_options
@pass_invocation
def stop(invocation: Invocation, names: tuple[str, ...], yes: bool, wait: bool, timeout: float | None) -> None:
    """Serve models no more; their instances drain and stop, their checkpoints stay.

    \b
    Examples:
      sllmctl model stop qwen --wait
    """
    from sllmctl import client
    from sllmctl.cli.diagnostics import confirm

    confirm(f"Stop {', '.join(names)}?", yes)
    words = ("stopping", "stopped")
    _end(invocation, names, client.stop_model, "stopped", words, invocation.patience(timeout), wait=wait)


@command.command("rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completion.names("model"))
@yes_option
@_wait_options
@pass_invocation
def rm(invocation: Invocation, names: tuple[str, ...], yes: bool, wait: bool, timeout: float | None) -> None:
    """Remove models, and the checkpoints that no other model uses.

    \b
    Examples:
      sllmctl model rm qwen tiny -y --wait
    """
    from sllmctl import client
    from sllmctl.cli.diagnostics import confirm

    confirm(f"Remove {', '.join(names)}, and the checkpoints that no other model uses?", yes)
    words = ("being removed", "removed")
    _end(invocation, names, client.remove_model, "gone", words, invocation.patience(timeout), wait=wait)


@command.command("ls")
@output_option
@watch_option
@pass_invocation
def ls(invocation: Invocation, form: Format, watch: bool) -> None:
    """List the models.

    \b
    Examples:
      sllmctl model ls -o wide
      sllmctl model ls --watch -o json
    """
    from sllmctl import client
    from sllmctl.cli.model_views import columns

    list_items(invocation, client.models(), "models", form, columns, lambda model: model.name, watch=watch)


@command.command("show")
@click.argument("name", shell_complete=completion.names("model"))
@output_option
@pass_invocation
def show(invocation: Invocation, name: str, form: Format) -> None:
    """Show one model: its source, scale, and how it does.

    \b
    Examples:
      sllmctl model show qwen
      sllmctl model show qwen -o yaml
    """
    from sllmctl import client
    from sllmctl.cli.model_views import fields

    with invocation.admin() as admin:
        item = admin.ask(client.model(name))
    show_item(form, item, fields, lambda model: model.name)


@command.command("spec")
@click.argument("names", metavar="[NAME...]", nargs=-1, shell_complete=completion.names("model"))
@click.option(
    "-o", "--output", "form", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True, help="How to print."
)
@pass_invocation
def spec(invocation: Invocation, names: tuple[str, ...], form: Literal["yaml", "json"]) -> None:
    """Print models, or all of them, as `sllmctl apply -f` takes them.

    \b
    Examples:
      sllmctl model spec > models.yaml
      sllmctl model spec qwen | sllmctl diff -f -
    """
    from sllmctl import client

    with invocation.admin() as admin:
        models = [admin.ask(client.model(name)) for name in dict.fromkeys(names)] if names else admin.ask(client.models())
    show_documents(form, [model.spec for model in models])


@command.command("logs")
@click.argument("name", shell_complete=completion.names("model"))
@click.option("--instance", metavar="ID", help="Of this instance alone.", shell_complete=completion.names("instance"))
@log_options
@pass_invocation
def logs(invocation: Invocation, /, name: str, instance: str | None, **options: Any) -> None:
    """Print what the workers of a model's instances wrote, those that died too.

    Each line says whose it is. A search for a request's id (the header x-request-id) finds what became of it there:

    \b
    Examples:
      sllmctl model logs docs --since 1h | grep req_01k...
    """
    show_logs(invocation, "model", name, instance, **options)


def _end(
    invocation: Invocation,
    names: Sequence[str],
    call: Callable[[str], Call[Any]],
    until: Until,
    words: tuple[str, str],
    patience: Patience,
    *,
    wait: bool,
) -> None:
    """Ask it of all the models, then with ``wait`` wait for each; ``words`` say what it is then, and in the end."""
    from sllmctl.cli.diagnostics import Refusals, note
    from sllmctl.cli.waiting import wait_for

    def ask(name: str) -> None:
        admin.ask(call(name))
        if not wait or len(names) > 1:
            note(f"model {name} is {words[0]}")

    def await_end(name: str) -> None:
        wait_for(admin, name, until, patience)
        note(f"model {name} is {words[1]}")

    with invocation.admin(patience) as admin, Refusals() as refusals:
        begun = refusals.each(names, ask)
        if wait:
            refusals.each(begun, await_end)


def _given_scale(options: dict[str, Any]) -> dict[str, Any]:
    names = {
        "min_instances": "min",
        "max_instances": "max",
        "keep_alive": "keep_alive_s",
        "concurrency": "max_concurrency",
        "queue_limit": "queue_limit",
    }
    return {names[key]: None if value == "auto" else value for key, value in options.items() if value is not None}


def _changed(scale: ScaleSpec, changed: dict[str, Any]) -> ScaleSpec:
    import msgspec

    new = msgspec.structs.replace(scale, **changed)
    if new.min > new.max:
        raise click.UsageError(f"--min {new.min} is above --max {new.max}")
    return new


def _bytes(text: str | None) -> int | None:
    from sllmctl.config import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--kv-size") from error


def _source(text: str, in_place: bool) -> Source:
    """What SOURCE means. An existing directory comes first: a relative path can look like a model of the hub."""
    from schema.spec import PathSource, source_of

    if not text:
        raise click.BadParameter("it is empty", param_hint="SOURCE")
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return PathSource(str(path.resolve()), in_place=in_place)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise click.BadParameter(f"{text[:200]} cannot be looked at: {reason}", param_hint="SOURCE") from error
    source = source_of(text)
    if source is None or (isinstance(source, PathSource) and not source.node):
        forms = "a model of the hub is written ORG/NAME, a directory of a node NODE:/PATH, one of a server https://HOST/PATH"
        if path.exists():
            raise click.BadParameter(f"{path} is a file; give the model's directory", param_hint="SOURCE")
        hint = "" if source else f"; {forms}"
        raise click.BadParameter(f"there is no directory {path}{hint}", param_hint="SOURCE")
    if in_place:
        if not isinstance(source, PathSource):
            raise click.UsageError("--in-place is for a directory: what is fetched from elsewhere is a copy anyway")
        source = PathSource(source.path, source.node, in_place=True)
    return source
