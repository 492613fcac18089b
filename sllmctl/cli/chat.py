"""`sllmctl chat`: one streamed answer, or a conversation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from sllmctl.cli.completion import names
from sllmctl.cli.context import Invocation, Real, pass_invocation
from sllmctl.cli.diagnostics import note, waiting_line
from sllmctl.cli.format import duration
from sllmctl.cli.output import read_line, stream, write

if TYPE_CHECKING:
    from sllmctl.client import AdminClient
    from sllmctl.inference import ChatOptions, ChatStream, Turn

__all__ = ["command"]

_COMMANDS = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C cancels a reply"


@click.command("chat")
@click.argument("prompt", required=False)
@click.option("-m", "--model", help="The model; may be left out if only one is deployed.", shell_complete=names("model"))
@click.option("-s", "--system", help="A system message.")
@click.option("--max-tokens", type=click.IntRange(1), help="The reply's length at most.")
@click.option("--temperature", type=Real(0, 2), help="0 takes the likeliest token always.")
@click.option("--top-p", type=Real(0, 1, min_open=True), help="Keep the likeliest tokens of this share.")
@click.option("--seed", type=click.IntRange(0), help="The same seed, the same reply.")
@click.option("--stats", is_flag=True, help="Say on stderr where the time went.")
@pass_invocation
def command(
    invocation: Invocation,
    prompt: str | None,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stats: bool,
) -> None:
    """Talk to a model: with a PROMPT (or one on stdin) one answer, without one a conversation.

    \b
    Examples:
      sllmctl chat -m tiny "What is a cold start?" --stats
      git diff | sllmctl chat -m qwen -s "Review this."
    """
    from sllmctl.inference import ChatOptions, Turn

    options = ChatOptions(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if prompt is None and not sys.stdin.isatty():
        prompt = _piped()
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty")
    with invocation.admin() as admin:
        chat = _Chat(invocation, admin, model, [Turn("system", system)] if system else [], options, stats)
        if prompt is not None:
            chat.reply(prompt)
        else:
            chat.converse()


def _piped() -> str:
    """The prompt on stdin. Raises UsageError for bytes that are no text."""
    try:
        prompt = sys.stdin.read()
        prompt.encode()
    except UnicodeError as error:
        raise click.UsageError(f"the prompt on stdin is not UTF-8 text: {error}") from error
    return prompt


class _Chat:
    """A conversation: what was said, and how to go on."""

    def __init__(
        self,
        invocation: Invocation,
        admin: AdminClient,
        model: str | None,
        turns: list[Turn],
        options: ChatOptions,
        stats: bool,
    ) -> None:
        from sllmctl import client

        self._settings = invocation.settings().client
        self._admin, self._options, self._stats = admin, options, stats
        self._url = admin.ask(client.status()).api_url
        self._model = model or _only_model(admin)
        self._opening, self._turns = list(turns), list(turns)

    def converse(self) -> None:
        """Read prompts until the end of input. A failed or cancelled reply is not part of the conversation."""
        from schema.errors import ContextOverflow, SllmError

        note(f"Talking to {self._model}. {_COMMANDS}.")
        while True:
            try:
                line = read_line(">>> ").strip()
            except EOFError:
                write("")
                return
            except KeyboardInterrupt:
                note("")
                continue
            if line in ("/quit", "/exit", "/bye"):
                return
            if line == "/reset":
                self._turns = list(self._opening)
            elif line.startswith("/"):
                note(f"{_COMMANDS}.")
            elif line:
                try:
                    self.reply(line)
                except KeyboardInterrupt:
                    note("\ncancelled")
                except ContextOverflow as error:
                    note(f"error: {error}; /reset forgets what was said before")
                except SllmError as error:
                    note(f"error: {error}")

    def reply(self, prompt: str) -> None:
        """Stream the answer to a prompt; leaving the stream early cancels the request."""
        from sllmctl.inference import ChatStream, Turn

        asked = [*self._turns, Turn("user", prompt)]
        pieces: list[str] = []
        coming = ChatStream(self._url, self._model, asked, self._options, self._settings)
        with waiting_line(f"waiting for {self._model}") as has_come, coming as reply:
            for text in reply:
                has_come()
                stream(text)
                pieces.append(text)
        write("")
        self._turns = [*asked, Turn("assistant", "".join(pieces))]
        if reply.finish_reason == "length":
            note("(the reply was cut off at its limit of tokens)")
        if self._stats:
            self._report(reply)

    def _report(self, reply: ChatStream) -> None:
        from schema.errors import NotFound
        from sllmctl import client
        from sllmctl.cli.phases import engine_text, start_text, timeline_text

        note(_speed(reply))
        try:
            timeline = self._admin.ask(client.request(reply.request_id)).timeline
        except NotFound:
            note("the manager does not remember this request any more")
            return
        note(f"{'cold' if timeline.cold else 'warm'} start: {timeline_text(timeline)}")
        if timeline.start is not None:
            note(f"instance: {start_text(timeline.start)}")
        if timeline.engine is not None:
            note(f"engine: {engine_text(timeline.engine)}")


def _speed(reply: ChatStream) -> str:
    tokens = f"{reply.prompt_tokens} prompt tokens, {reply.generated_tokens} generated"
    if reply.first_token_s is None or reply.total_s is None:
        return tokens
    text = f"first token after {duration(reply.first_token_s)}, {tokens} in {duration(reply.total_s)}"
    rest_s = reply.total_s - reply.first_token_s
    if reply.generated_tokens > 1 and rest_s > 0:
        text += f", {(reply.generated_tokens - 1) / rest_s:.1f} tokens/s"
    return text


def _only_model(admin: AdminClient) -> str:
    from sllmctl import client

    names = [model.name for model in admin.ask(client.models()) if model.state == "deployed"]
    if len(names) == 1:
        return names[0]
    if not names:
        raise click.UsageError("no model is deployed; `sllmctl model add NAME SOURCE --deploy` adds one")
    raise click.UsageError(f"say which model with -m: {', '.join(names)}")
