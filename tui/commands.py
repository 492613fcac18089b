"""The one table of commands: keys, the help, the palette, the hints at the foot and what ``:`` takes are all read from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tui import actions
from tui.views import VIEWS

__all__ = ["COMMANDS", "Command", "called", "for_key", "of_view"]

Act = Callable[[actions.Desk, Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Command:
    """``name`` is what ``:`` takes, ``key`` as Textual names it. ``does`` is a method of the application's, ``act`` an action
    on the row under the cursor (``rowless``: on none). ``views`` are where it is to be had, () everywhere; ``hint`` is its word
    at the foot. ``writes`` are not to be had in read-only mode."""

    name: str
    key: str
    help: str
    section: str
    hint: str = ""
    does: str = ""
    argument: str = ""
    act: Act | None = None
    views: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    writes: bool = False
    rowless: bool = False

    @property
    def shown_key(self) -> str:
        """The key as people write it."""
        named = {"colon": ":", "slash": "/", "question_mark": "?", "escape": "Esc", "enter": "Enter"}
        return named.get(self.key, self.key.replace("ctrl+", "Ctrl-"))

    def is_for(self, view: str) -> bool:
        return not self.views or view in self.views


def _view(number: int, name: str, aliases: tuple[str, ...], line: str) -> Command:
    return Command(name, str(number), line, "Views", does="jump", argument=name, aliases=aliases)


def _on(view: str, name: str, key: str, hint: str, line: str, act: Act, *, rowless: bool = False) -> Command:
    return Command(name, key, line, view.capitalize(), hint, act=act, views=(view,), writes=True, rowless=rowless)


COMMANDS: tuple[Command, ...] = (
    *(_view(number, kind.name, kind.aliases, kind.help) for number, kind in enumerate(VIEWS, 1)),
    Command("jump", "colon", "Jump to a view, or run any command, by its name.", "General", "jump", "prompt_jump"),
    Command(
        "filter",
        "slash",
        "Show the rows that have every word; !word hides them. Esc clears it.",
        "General",
        "filter",
        "prompt_filter",
    ),
    Command("help", "question_mark", "This help.", "General", "help", "show_help"),
    Command("palette", "ctrl+p", "All commands, found by typing.", "General", does="command_palette"),
    Command(
        "open",
        "enter",
        "What belongs to the row: a node's or a model's instances, an instance's requests.",
        "General",
        does="drill",
    ),
    Command("back", "escape", "Back: out of the filter, then to where you came from.", "General", does="back"),
    Command("detail", "d", "Show or hide the detail pane.", "General", "detail", "toggle_detail"),
    Command("sort", "s", "Sort by the next column; a click on a column's head does too.", "General", "sort", "sort_next"),
    Command("reverse", "r", "Turn the order round.", "General", does="sort_turn"),
    Command("theme", "L", "Turn between colours for dark terminals and for light ones.", "General", does="turn_theme"),
    Command("quit", "q", "Leave.", "General", "quit", "leave", aliases=("exit",)),
    Command(
        "why",
        "x",
        "Why: where the next instance of this row's model would go, every node weighed.",
        "General",
        "explain",
        act=actions.explain,
        views=("models", "instances", "requests", "explain"),
    ),
    Command(
        "output",
        "l",
        "What the workers of the row's model or instance wrote, or a node's agent; it follows.",
        "General",
        "logs",
        act=actions.show_logs,
        views=("cluster", "models", "instances", "requests"),
    ),
    _on("models", "add", "a", "add", "Add a model and deploy it.", actions.add_model, rowless=True),
    _on("models", "deploy", "o", "deploy", "Deploy a model that is stopped.", actions.deploy_model),
    _on("models", "scale", "c", "scale", "Change how many instances there are, and how busy they may be.", actions.scale_model),
    _on("models", "stop", "t", "stop", "Stop serving a model; asks first.", actions.stop_model),
    _on("models", "remove", "ctrl+d", "remove", "Remove a model and its checkpoint; asks first.", actions.remove_model),
    _on("instances", "stop-instance", "t", "stop", "Stop an instance; asks first.", actions.stop_instance),
    _on("requests", "cancel", "t", "cancel", "Cancel a request; asks first.", actions.cancel_request),
    _on("checkpoints", "prefetch", "f", "prefetch", "Bring a checkpoint into a node's memory.", actions.prefetch_checkpoint),
    _on("checkpoints", "pin", "p", "pin", "Keep a checkpoint on a tier of a node.", actions.pin_checkpoint),
    _on("checkpoints", "unpin", "u", "unpin", "Let it go again.", actions.unpin_checkpoint),
    _on("checkpoints", "verify", "v", "verify", "Compare copies on disk with their checksums.", actions.verify_checkpoint),
    _on(
        "checkpoints",
        "drop",
        "ctrl+d",
        "drop",
        "Take a checkpoint from a tier of a node, or of all; asks first.",
        actions.drop_checkpoint,
    ),
)


def of_view(view: str, *, read_only: bool) -> list[Command]:
    """What can be done in a view."""
    return [command for command in COMMANDS if command.is_for(view) and not (read_only and command.writes)]


def for_key(key: str, view: str) -> Command | None:
    """The command of a key in a view; its own before what is everywhere."""
    found = [command for command in COMMANDS if command.key == key and command.is_for(view)]
    return max(found, key=lambda command: bool(command.views), default=None)


def called(text: str, commands: Iterable[Command]) -> Command | None:
    """The command of a name or an alias, or of a beginning that no other has."""
    word = text.strip().lower()
    known = list(commands)
    exact = [command for command in known if word in (command.name, *command.aliases)]
    begun = [command for command in known if any(name.startswith(word) for name in (command.name, *command.aliases))]
    return exact[0] if exact else begun[0] if word and len(begun) == 1 else None
