"""Stop strings across pieces of text: what may be sent now, what must be held back, where the text ends."""

from __future__ import annotations

__all__ = ["StopMatcher"]


class StopMatcher:
    """Cuts a text that comes in pieces before the stop string that is complete first.

    Of several that are complete at the same character the longest cuts. So the result does not depend on how the text is
    cut into pieces. ``matched`` says that the end was found; after that nothing more comes out.
    """

    __slots__ = ("_held", "_longest", "_prefixes", "_stops", "matched")

    def __init__(self, stops: tuple[str, ...]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = stops
        self._prefixes = frozenset(stop[:size] for stop in stops for size in range(1, len(stop)))
        self._longest = max((len(stop) - 1 for stop in stops), default=0)
        self._held = ""
        self.matched = False

    def push(self, piece: str) -> str:
        """The text that is certain with this piece; what may begin a stop string stays back."""
        if self.matched or not piece:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.matched = True
            self._held = ""
            return text[: min(found)[1]]
        keep = self._held_size(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of a text in which no stop string was completed."""
        held, self._held = self._held, ""
        return held

    def _held_size(self, text: str) -> int:
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self._prefixes:
                return size
        return 0
