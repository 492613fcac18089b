"""`sllmctl serve`: the manager in the foreground."""

from __future__ import annotations

import click

from sllmctl.cli.context import Invocation, pass_invocation

__all__ = ["command"]


@click.command("serve")
@click.option("--host", help="Where the inference API listens [default: 127.0.0.1].")
@click.option("--port", type=click.IntRange(0, 65535), help="Its port; 0 takes a free one [default: 8080].")
@click.option("--state-dir", type=click.Path(), help="Where the manager keeps its state.")
@click.option("--arena", metavar="SIZE", help="Memory for weights on this machine, as in 8GiB [default: 1GiB].")
@click.option("--threads", type=click.IntRange(0), help="CPU threads of an instance; 0 is all cores.")
@click.option("--stop-agent/--keep-agent", default=None, help="Whether this machine's node ends with it [default: it does].")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]")
@click.option("--log-format", type=click.Choice(["console", "json"]), help="Of its node's logs too [default: console].")
@pass_invocation
def command(
    invocation: Invocation,
    host: str | None,
    port: int | None,
    state_dir: str | None,
    arena: str | None,
    threads: int | None,
    stop_agent: bool | None,
    log_level: str | None,
    log_format: str | None,
) -> int:
    """Run the manager until SIGTERM or Ctrl-C, and the node of this machine with it.

    Everything else that can be set is set in the configuration file or by SLLM_* variables, as [gateway] body_limit_bytes or
    SLLM_GATEWAY_BODY_LIMIT_BYTES.

    \b
    Examples:
      sllmctl serve --arena 8GiB
      SLLM_GATEWAY_BODY_LIMIT_BYTES=1000000 sllmctl --config /etc/sllmctl/config.toml serve
    """
    from sllmctl.cli.diagnostics import log_to_stderr

    settings = invocation.settings(
        api__host=host,
        api__port=port,
        state_dir=state_dir,
        node__arena_bytes=arena,
        node__threads=threads,
        serve__stop_agent=stop_agent,
        log_level=log_level,
        log_format=log_format,
    )
    log_to_stderr(settings.log_level, settings.log_format)
    from sllmctl import bundle, serve

    root = bundle.unpacked_root()
    if root is not None:
        bundle.remove_old_builds(root)
    return serve.run(settings)
