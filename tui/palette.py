"""The colours of a dark and of a light terminal, by what they are for. Whatever is drawn names a use, never a colour.

A style is Rich's, with uses in the place of colours: ``bold accent``, ``good on track``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from rich.style import Style
from rich.text import Span, Text
from textual.app import App
from textual.theme import Theme

__all__ = ["DARK", "LIGHT", "Palette", "palette_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Palette:
    """``page`` lies under everything, ``strip`` under the lines at top and foot and under dialogs, ``headrow`` under a table's
    head, ``cursor`` under its row (``resting``: while the keys go elsewhere), ``entry`` and ``writing`` under what is typed in,
    ``ink`` is text upon ``accent`` and ``bad``."""

    plain: str
    muted: str
    faint: str
    accent: str
    good: str
    warn: str
    bad: str
    device: str
    head: str
    ink: str
    page: str
    strip: str
    track: str
    headrow: str
    cursor: str
    resting: str
    entry: str
    writing: str
    knob: str

    def style(self, text: str | Style) -> Style:
        """What a style that names uses looks like."""
        return _style(self, text) if isinstance(text, str) else text

    def text(self, text: Text) -> Text:
        """The same text with its styles looked up."""
        painted = text.copy()
        painted.style = self.style(text.style)
        painted.spans = [Span(begin, end, self.style(style)) for begin, end, style in text.spans]
        return painted

    def theme(self, name: str, *, dark: bool) -> Theme:
        """For the stylesheet, and for Textual's own widgets."""
        return Theme(
            name,
            dark=dark,
            primary=self.accent,
            secondary=self.accent,
            accent=self.accent,
            foreground=self.plain,
            background=self.page,
            surface=self.strip,
            panel=self.headrow,
            success=self.good,
            warning=self.warn,
            error=self.bad,
            variables={
                **{f"use-{use}": colour for use, colour in asdict(self).items()},
                "scrollbar": self.faint,
                "scrollbar-hover": self.muted,
                "scrollbar-active": self.accent,
                "scrollbar-background": self.page,
                "scrollbar-background-hover": self.page,
                "scrollbar-background-active": self.page,
                "scrollbar-corner-color": self.page,
                "block-cursor-background": self.cursor,
                "block-cursor-foreground": self.plain,
                "border": self.accent,
            },
        )


@lru_cache(maxsize=1024)
def _style(palette: Palette, text: str) -> Style:
    return Style.parse(" ".join(getattr(palette, word, word) for word in text.split()))


DARK = Palette(
    plain="#d6dae0",
    muted="#7d8590",
    faint="#30363d",
    accent="#6cb6ff",
    good="#7ee787",
    warn="#e3b341",
    bad="#ff7b72",
    device="#d2a8ff",
    head="#adbac7",
    ink="#0d1117",
    page="#0d1117",
    strip="#161b22",
    track="#30363d",
    headrow="#22272e",
    cursor="#264166",
    resting="#2d333b",
    entry="#0d1117",
    writing="#1f2937",
    knob="#21262d",
)
LIGHT = Palette(
    plain="#1f2328",
    muted="#59636e",
    faint="#c8d1da",
    accent="#0969da",
    good="#116329",
    warn="#7d4e00",
    bad="#cf222e",
    device="#8250df",
    head="#424a53",
    ink="#ffffff",
    page="#ffffff",
    strip="#f0f3f6",
    track="#d1d9e0",
    headrow="#e1e6ec",
    cursor="#c8e1ff",
    resting="#e1e6ec",
    entry="#ffffff",
    writing="#ddeaf9",
    knob="#dfe5eb",
)


def palette_of(app: App[Any]) -> Palette:
    """The one that is shown."""
    return DARK if app.current_theme.dark else LIGHT
