"""One choice of a reply: its sequence, pulled from the journal and read as text, with log-probabilities where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from schema.errors import Cancelled, SllmError
from schema.link import SamplingParams
from schema.sampling import read_logprobs
from schema.states import EndReason
from sllmctl.gateway.logprobs import ScoredToken
from sllmctl.gateway.ports import SequencePort
from sllmctl.gateway.replies import Finish
from sllmctl.gateway.stop import StopMatcher
from sllmctl.gateway.text import TextModel

__all__ = ["Piece", "Reply"]

_REASONS: dict[EndReason, Finish] = {EndReason.STOP: "stop", EndReason.LENGTH: "length"}


class Piece(NamedTuple):
    """Some more of a reply: its certain text, and the tokens that it came with where their log-probabilities are told."""

    text: str
    scores: Sequence[ScoredToken] = ()


class Reply:
    """``reason`` is set with its last text; ``position`` counts the tokens read."""

    __slots__ = ("_chars", "_detokenizer", "_least", "_scored", "_sequence", "_stop", "_text", "index", "position", "reason")

    def __init__(
        self, index: int, sequence: SequencePort, text: TextModel, stops: tuple[str, ...], params: SamplingParams
    ) -> None:
        self.index = index
        self.position = 0
        self.reason: Finish | None = None
        self._sequence = sequence
        self._text = text
        self._detokenizer = text.detokenizer()
        self._stop = StopMatcher(stops) if stops else None
        self._least = params.min_tokens
        self._scored = params.logprobs is not None
        self._chars = 0

    @property
    def cut(self) -> bool:
        """Whether a stop string ended it."""
        return self._stop is not None and self._stop.matched

    async def next(self) -> Piece:
        """Wait for more tokens, or the end; all that is there. Raises the SllmError of a sequence that failed."""
        await self._sequence.wait(self.position)
        return await self._take()

    async def all(self, max_tokens: int) -> Piece:
        """The whole reply, read once it is complete, so that tokens on the way wake nobody; with stop strings, as they come.

        Raises the SllmError of a sequence that failed or was cancelled, however much of it was there.
        """
        pieces: list[Piece] = []
        if self._stop is None:
            # A sequence never has more than max_tokens: this returns at its end.
            await self._sequence.wait(max_tokens)
            pieces.append(await self._take())
        while self.reason is None:
            pieces.append(await self.next())
        return Piece("".join([piece.text for piece in pieces]), [score for piece in pieces for score in piece.scores])

    async def _take(self) -> Piece:
        sequence, position = self._sequence, self.position
        finish = sequence.finish
        tokens = sequence.tokens[position:]
        if finish is not None and finish not in _REASONS and not tokens:
            await sequence.wait(len(sequence.tokens))
            raise _failure(finish)
        read = self._read_each if self._stop is not None or self._scored else self._read
        aside = self._text.aside if self._text.detokenizer.aside else None
        text, offsets = read(tokens, finish) if aside is None else await aside(lambda: read(tokens, finish))
        if self.cut:
            sequence.complete()
        scores = self._scores(position, offsets)
        if scores and aside is not None:
            await aside(lambda: self._spell(scores))
        return Piece(text, scores)

    def _read(self, tokens: list[int], finish: EndReason | None) -> tuple[str, list[int]]:
        """The text of these tokens, after which the sequence goes on or has come to its ``finish``."""
        self.position += len(tokens)
        text = self._detokenizer.push(tokens)
        if finish in _REASONS:
            self.reason = _REASONS[finish]
            text += self._detokenizer.flush()
        return text, []

    def _read_each(self, tokens: list[int], finish: EndReason | None) -> tuple[str, list[int]]:
        """The same token by token, so that where a reply ends and what it counts do not depend on how tokens arrive; with
        where the text of each token that counts begins."""
        stop, parts, offsets = self._stop, [], []
        for token in tokens:
            self.position += 1
            offsets.append(self._chars)
            text = self._detokenizer.push((token,))
            self._chars += len(text)
            # What comes before min_tokens ends nothing, and begins no stop string.
            parts.append(text if stop is None or self.position <= self._least else stop.push(text))
            if stop is not None and stop.matched:
                self.reason = "stop"
                break
        if self.reason is None and finish in _REASONS:
            self.reason = _REASONS[finish]
            rest = self._detokenizer.flush()
            if stop is None:
                parts.append(rest)
            else:
                parts += (stop.push(rest), stop.flush())
                self.reason = "stop" if stop.matched else self.reason
        return "".join(parts), offsets

    def _spell(self, scores: Sequence[ScoredToken]) -> None:
        """Look up what all these stand for, so that whoever writes them finds it known."""
        spell = self._text.detokenizer.spell
        for score in scores:
            for token in (score.token, *(token for token, _ in score.top)):
                spell(token)

    def _scores(self, first: int, offsets: list[int]) -> list[ScoredToken]:
        """Of the tokens from position ``first`` on whose texts begin at ``offsets``."""
        if not self._scored or not offsets:
            return []
        known = self._sequence.logprobs
        size = len(known) // len(self._sequence.tokens)
        records = bytes(known[first * size : (first + len(offsets)) * size])
        return [
            ScoredToken(token, offset, logprob, top)
            for offset, (token, logprob, top) in zip(offsets, read_logprobs(records, len(offsets)), strict=True)
        ]


def _failure(finish: EndReason) -> SllmError:
    if finish == EndReason.CANCELLED:
        return Cancelled("the request was cancelled by an operator")
    return SllmError(f"the request ended as {finish.value} without saying why")
