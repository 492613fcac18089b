"""Text and tokens: each checkpoint's tokenizer and chat template, loaded once; what takes long is done off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from tokenizers import Tokenizer

from schema.checkpoint import TextDefaults
from schema.errors import ContextOverflow, InvalidCheckpoint, InvalidInput, Overloaded
from sllmctl.gateway.detokenize import DetokenizerFactory
from sllmctl.gateway.ports import TextAssetsPort
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.template import TemplateRenderer
from sllmctl.gateway.tokenizer_faults import checkpoint_at_fault

__all__ = ["TextModel", "TextService", "context_holds"]

# One text at a time is tokenised by one thread of ours; a pool of the library's own under it would only contend.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class _AddedToken(msgspec.Struct):
    id: int
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    """The parts of tokenizer.json that the library does not hand out."""

    decoder: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = []


# Made here, on the importing thread: two threads that are the first to decode a type crash the process (msgspec 0.22).
_TOKENIZER_FILES: Final = msgspec.json.Decoder(_TokenizerFile)

_CANNOT_ENCODE: Final = "the model's tokenizer cannot encode this text"
R = TypeVar("R")

_PROBE: Final = "The quick brown fox jumps over the lazy dog. "
_SLOW_S: Final = 0.005
_SLOW_TEXTS: Final = 2
"""A tokenizer that takes so long of a processor over so many short texts, one after the other, is not trusted with the event
loop again. Over one it may: a collection of garbage can fall into it."""


class TextModel:
    """The text side of one checkpoint.

    ``defaults`` are its generation defaults, of which none is outside the range that an engine takes. ``detokenizer()``
    makes a detokenizer for one sequence; special and stop tokens have no text.
    """

    def __init__(self, assets: TextAssetsPort, settings: GatewaySettings) -> None:
        manifest = assets.manifest
        self.digest = manifest.digest
        self.vocab_size = manifest.vocab_size
        self.defaults = _usable(manifest.text)
        self._timeout_s = settings.encode_timeout_s
        self._inline_chars = settings.inline_encode_chars
        self._slots = asyncio.Semaphore(settings.encode_threads)
        self._tokenizer, parts = _read_tokenizer(assets.directory / "tokenizer.json")
        special = {token.id for token in parts.added_tokens if token.special}
        self.detokenizer = DetokenizerFactory(
            self._tokenizer, parts.decoder, frozenset(special.union(manifest.text.stop_token_ids))
        )
        self.template = _read_template(assets.directory) if manifest.text.has_template else None
        self._slow_texts = 0
        probe = (_PROBE * (self._inline_chars // len(_PROBE) + 1))[: self._inline_chars]
        with contextlib.suppress(InvalidCheckpoint):  # told when a request's text meets it
            for _ in range(1 + _SLOW_TEXTS):  # the first fills the tokenizer's own caches
                self._encode_timed(probe, special=False)

    async def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of ``text``; with ``special``, as the tokenizer frames a whole text (a beginning token and the like).

        Raises InvalidCheckpoint when the tokenizer fails at it, or makes an id that the model does not have; Overloaded when it
        takes too long over this text, or over those before it.
        """
        if len(text) <= self._inline_chars and self._slow_texts < _SLOW_TEXTS:
            ids = self._encode_timed(text, special)
        else:
            ids = await self.aside(lambda: self._encode(text, special))
        if (highest := max(ids, default=0)) >= self.vocab_size:
            raise InvalidCheckpoint(
                f"the model's tokenizer makes token id {highest} of this text, beyond its vocabulary of {self.vocab_size}"
            )
        return ids

    def _encode_timed(self, text: str, special: bool) -> list[int]:
        began_s = time.thread_time()
        try:
            return self._encode(text, special)
        finally:
            self._slow_texts = self._slow_texts + 1 if time.thread_time() - began_s > _SLOW_S else 0

    async def aside(self, work: Callable[[], R]) -> R:
        """What the tokenizer is to do, on a thread that nobody has to wait for: a stuck one holds up neither the manager's end
        nor other models. Raises what ``work`` raises, Overloaded when it takes too long, or those before it do."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._on_a_thread(work)
        except TimeoutError:
            raise Overloaded(
                f"the model's tokenizer took over {self._timeout_s:g} s for this text or for those before it", 1.0
            ) from None

    async def _on_a_thread(self, work: Callable[[], R]) -> R:
        loop = asyncio.get_running_loop()

        def free() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(self._slots.release)

        await self._slots.acquire()
        try:
            answer = _begin(work, free)
        except Overloaded:
            self._slots.release()
            raise
        return await asyncio.wrap_future(answer)

    def _encode(self, text: str, special: bool) -> list[int]:
        # Encoding a batch lets go of the interpreter lock, encoding a single text does not; the fast one keeps no offsets.
        with checkpoint_at_fault(_CANNOT_ENCODE):
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids


def _begin(work: Callable[[], R], done: Callable[[], None] = lambda: None) -> Future[R]:
    """Work on a thread that does not hold up the manager's end, and then ``done``. Raises Overloaded when the system gives no
    more threads."""
    answer: Future[R] = Future()
    answer.set_running_or_notify_cancel()  # so that who stops waiting does not cancel it

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # a panic of the library's is no Exception
            answer.set_exception(error)
        done()

    try:
        threading.Thread(target=run, name="tokenizer", daemon=True).start()
    except RuntimeError as error:
        raise Overloaded(f"the model's tokenizer cannot be used now: {error}", 1.0) from error
    return answer


class TextService:
    """Tokenizers and templates of the checkpoints in use, the last used kept; and the template helper process.

    `start` and `close` belong to its owner, the gateway's application.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._renderer = TemplateRenderer(settings)
        self._models: OrderedDict[str, TextModel] = OrderedDict()
        self._loading: dict[str, asyncio.Task[TextModel]] = {}

    async def start(self) -> None:
        """Warm the template helper. Raises Unreachable when it cannot be started."""
        await self._renderer.start()

    async def close(self) -> None:
        """End the helper process; what still loads is waited for no more."""
        await self._renderer.close()
        loading = list(self._loading.values())
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)

    def cached(self, digest: str) -> TextModel | None:
        """The text side of a checkpoint, if it is loaded."""
        model = self._models.get(digest)
        if model is not None:
            self._models.move_to_end(digest)
        return model

    async def load(self, assets: TextAssetsPort) -> TextModel:
        """The text side of a checkpoint from its assets; of several callers only the first loads it.

        Raises InvalidCheckpoint when tokenizer or template cannot be read, Overloaded when that takes too long; it goes on, and
        holds up no other model.
        """
        digest = assets.manifest.digest
        if (model := self.cached(digest)) is not None:
            return model
        if (task := self._loading.get(digest)) is None:
            task = self._loading[digest] = asyncio.get_running_loop().create_task(
                self._load(assets), name=f"text {digest[:12]}"
            )
            task.add_done_callback(partial(self._loaded, digest))
        limit_s = self._settings.assets_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                # One caller that goes away does not take the load from the others.
                return await asyncio.shield(task)
        except TimeoutError:
            raise Overloaded(f"the model's tokenizer is not loaded after {limit_s:g} s; try again", 1.0) from None

    async def encode(self, model: TextModel, text: str, context_tokens: int) -> list[int]:
        """A completion's prompt, framed as the tokenizer frames a whole text.

        Raises ContextOverflow for a text so long that it is not worth tokenising for a context of ``context_tokens``.
        """
        self._check_length(len(text), context_tokens, "prompt")
        return await model.encode(text, special=True)

    async def encode_chat(self, model: TextModel, messages: list[dict[str, Any]], context_tokens: int) -> list[int]:
        """A chat's prompt, up to where the assistant speaks.

        Raises InvalidInput when the model has no template or its template refuses the messages, ContextOverflow as `encode`.
        """
        self._check_length(sum(len(message["content"]) for message in messages), context_tokens, "messages")
        if model.template is None:
            raise InvalidInput("this model has no chat template; use /v1/completions", "model")
        variables = {
            **model.defaults.special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        text = await self._renderer.render(model.template, variables)
        self._check_length(len(text), context_tokens, "messages")
        # The template writes the special tokens out; the tokenizer must not add them again.
        return await model.encode(text, special=False)

    def _check_length(self, chars: int, context_tokens: int, param: str) -> None:
        limit = context_tokens * self._settings.chars_per_token_limit
        if chars > limit:
            raise ContextOverflow(
                f"the prompt has {chars} characters; {context_holds(context_tokens)}, for which at most {limit} characters are "
                "read; shorten it",
                param,
            )

    def _loaded(self, digest: str, task: asyncio.Task[TextModel]) -> None:
        del self._loading[digest]
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody may have

    async def _load(self, assets: TextAssetsPort) -> TextModel:
        model = await asyncio.wrap_future(_begin(lambda: TextModel(assets, self._settings)))
        self._models[model.digest] = model
        while len(self._models) > self._settings.tokenizers_kept:
            self._models.popitem(last=False)
        return model


def _read_tokenizer(path: Path) -> tuple[Tokenizer, _TokenizerFile]:
    with checkpoint_at_fault(f"the tokenizer {path} cannot be read"):
        data = path.read_bytes()
        tokenizer = Tokenizer.from_buffer(data)
        parts = _TOKENIZER_FILES.decode(data)
    # What a training run left set would cut and fill prompts unasked.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, parts


def _read_template(directory: Path) -> str:
    path = directory / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCheckpoint(f"the chat template {path} cannot be read: {error}") from error


def _usable(defaults: TextDefaults) -> TextDefaults:
    """The defaults without those that no engine takes: a directory's generation_config may say anything."""
    temperature, top_p, top_k = defaults.temperature, defaults.top_p, defaults.top_k
    min_p, penalty = defaults.min_p, defaults.repetition_penalty
    return msgspec.structs.replace(
        defaults,
        temperature=temperature if temperature is not None and 0 <= temperature <= 100 else None,
        top_p=top_p if top_p is not None and 0 <= top_p <= 1 else None,
        top_k=top_k if top_k is not None and top_k >= 0 else None,
        min_p=min_p if min_p is not None and 0 <= min_p <= 1 else None,
        repetition_penalty=penalty if penalty is not None and 0.01 <= penalty <= 100 else None,
    )


def context_holds(tokens: int) -> str:
    """The most that one request may have, for whoever asked for more."""
    return (
        f"this model's context, or the KV memory of its instances where that is smaller, holds {tokens} tokens, reply included"
    )
