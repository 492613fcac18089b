"""Token ids to text, piece by piece: no piece splits a character, and together they are what decoding at once gives.

Three families cover the tokenizers of today's language models: byte-level (GPT-2, Llama 3, Qwen), SentencePiece with byte
fallback (Llama 2, Mistral, Gemma), and Metaspace (T5, Unigram). Each keeps a table from id to its part of the text, so
that a token costs a look-up. Anything else is decoded over a sliding window.

The rules of each family are those of the decoders of https://github.com/huggingface/tokenizers (tokenizers/src/decoders).
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer

from sllmctl.gateway.tokenizer_faults import checkpoint_at_fault

__all__ = ["DetokenizerFactory"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_RUN_LIMIT_BYTES = 64
"""A run of byte tokens this long gives out its whole characters before it has ended: no text waits for ever."""
_HELD_TOKENS = 64
"""So many tokens that end in no whole character are given out as they are: no window grows for ever."""


class Detokenizer(ABC):
    """Turns one sequence's ids into text."""

    @abstractmethod
    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids make certain; an incomplete character stays back."""

    @abstractmethod
    def flush(self) -> str:
        """What stayed back, at the end of the sequence."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class _Table(dict[int, Any]):
    """Parts of the text by id, made when they are first asked for: a vocabulary is large, a reply uses little of it."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, token: int) -> Any:
        value = self[token] = self._make(token)
        return value


class _ByteLevel(Detokenizer):
    """Every token is bytes of UTF-8."""

    def __init__(self, table: _Table) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, ids: Iterable[int]) -> str:
        table = self._table
        return self._decode(b"".join([table[token] for token in ids]))

    def flush(self) -> str:
        return self._decode(b"", True)


class _ByteFallback(Detokenizer):
    """Tokens are text; ``<0xE2>`` and its kin are single bytes, which count as text only if their whole run is UTF-8.

    ``strip`` leading spaces of the whole text are cut.
    """

    def __init__(self, table: _Table, strip: int) -> None:
        self._table = table
        self._strip = strip
        self._run = bytearray()
        self._decode: Callable[[bytes, bool], str] | None = None

    def push(self, ids: Iterable[int]) -> str:
        table, parts = self._table, []
        for token in ids:
            part = table[token]
            if part is None:
                continue
            if isinstance(part, int):
                parts.append(self._byte(part))
            else:
                if self._run or self._decode:
                    parts.append(self._end_run())
                parts.append(part)
        return self._stripped("".join(parts))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _byte(self, byte: int) -> str:
        if self._decode:
            return self._decode(bytes((byte,)), False)
        self._run.append(byte)
        if len(self._run) < _RUN_LIMIT_BYTES:
            return ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        run, self._run = bytes(self._run), bytearray()
        return self._decode(run, False)

    def _end_run(self) -> str:
        if self._decode:
            rest, self._decode = self._decode(b"", True), None
            return rest
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class _Metaspace(Detokenizer):
    """Tokens are text with a mark for the space; in the first token marks are dropped where the encoder put one there."""

    def __init__(self, table: _Table, mark: str, *, drops_first: bool) -> None:
        self._table = table
        self._mark = mark
        self._first = drops_first

    def push(self, ids: Iterable[int]) -> str:
        parts = [part for token in ids if (part := self._table[token]) is not None]
        if self._first and parts:
            self._first = False
            parts[0] = parts[0].replace(self._mark, "")
        return "".join(parts).replace(self._mark, " ")

    def flush(self) -> str:
        return ""


class _Window(Detokenizer):
    """Any decoder: decode the ids since the last whole character with some before them, and take what is new."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._read = 0
        self._sent = ""

    def push(self, ids: Iterable[int]) -> str:
        self._ids += ids
        text = self._decode(self._ids)
        held = text.endswith(_REPLACEMENT) and len(self._ids) - self._read < _HELD_TOKENS
        return "" if held else self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[len(self._sent) :]
        if piece or len(self._ids) - self._read >= _HELD_TOKENS:
            # Those that made this piece, or so many that made none, stay, as the context that the next ones are decoded in.
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
            self._sent = self._decode(self._ids)
        return piece


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer; ``decoder`` is that part of tokenizer.json, ``skipped`` ids have no text.

    Tables are shared by the detokenizers of one factory, which is used by one thread. Where ``aside`` is true there is no
    table of the tokens' text: the library decodes, as slowly as the checkpoint's decoder makes it (which may have a regular
    expression of any cost), and is to be kept off an event loop.
    """

    def __init__(self, tokenizer: Tokenizer, decoder: dict[str, Any] | None, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self.aside = False
        self._make, self._spell = self._family(decoder)

    def __call__(self) -> Detokenizer:
        return self._make()

    def spell(self, token: int) -> bytes:
        """What a token stands for by itself, also where it is but a part of a character; for one without text, its name."""
        if token in self._skipped:
            return (self._tokenizer.id_to_token(token) or "").encode()
        part = self._spell(token)
        if isinstance(part, int):
            return bytes((part,))
        return part.encode() if isinstance(part, str) else part or b""

    def _family(
        self, decoder: dict[str, Any] | None
    ) -> tuple[Callable[[], Detokenizer], Callable[[int], bytes | str | int | None]]:
        """Makes a detokenizer; gives the part of the text of one token."""
        steps = _steps(decoder)
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            table = _Table(self._bytes_of)
            return lambda: _ByteLevel(table), table.__getitem__
        if kinds == ["Metaspace"]:
            mark, scheme = steps[0].get("replacement", "▁"), steps[0].get("prepend_scheme", "always")
            # Files of older versions say add_prefix_space instead of a scheme.
            drops = scheme != "never" and steps[0].get("add_prefix_space", True) is not False
            table = _Table(self._token_of)
            return lambda: _Metaspace(table, mark, drops_first=drops), lambda token: (table[token] or "").replace(mark, " ")
        if (plan := _fallback_plan(steps)) is not None:
            replaces, strip = plan
            table = _Table(lambda token: self._part_of(token, replaces))
            return lambda: _ByteFallback(table, strip), table.__getitem__
        self.aside = True
        table = _Table(lambda token: self._decode([token]))
        return lambda: _Window(self._decode), table.__getitem__

    def _token_of(self, token: int) -> str | None:
        return None if token in self._skipped else self._tokenizer.id_to_token(token)

    def _bytes_of(self, token: int) -> bytes:
        name = self._token_of(token)
        if name is None:
            return b""
        try:
            return bytes([_BYTES[character] for character in name])
        except KeyError:
            return name.encode()

    def _part_of(self, token: int, replaces: list[tuple[str, str]]) -> str | int | None:
        name = self._token_of(token)
        if name is None:
            return None
        for old, new in replaces:
            name = name.replace(old, new)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            try:
                return int(name[3:5], 16)
            except ValueError:
                return name
        return name

    def _decode(self, ids: list[int]) -> str:
        with checkpoint_at_fault("the model's tokenizer cannot decode what the model said"):
            # Decoding a batch lets go of the interpreter lock, decoding a single text does not.
            kept = [token for token in ids if token not in self._skipped]
            return str(self._tokenizer.decode_batch([kept], skip_special_tokens=False)[0])


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return list(decoder.get("decoders", ())) if decoder.get("type") == "Sequence" else [decoder]


def _fallback_plan(steps: list[dict[str, Any]]) -> tuple[list[tuple[str, str]], int] | None:
    """(replacements, leading spaces to cut) for Replace*, ByteFallback, Fuse[, Strip of leading spaces]; None for others."""
    replaces: list[tuple[str, str]] = []
    rest = list(steps)
    while rest and rest[0].get("type") == "Replace":
        pattern = rest[0].get("pattern", {})
        if "String" not in pattern:
            return None
        replaces.append((pattern["String"], rest.pop(0).get("content", "")))
    kinds = [step.get("type") for step in rest]
    if kinds == ["ByteFallback", "Fuse"]:
        return replaces, 0
    if kinds == ["ByteFallback", "Fuse", "Strip"] and rest[2].get("content") == " " and not rest[2].get("stop"):
        return replaces, int(rest[2].get("start", 0))
    return None
