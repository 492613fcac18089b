"""The manager: state, scheduling, the HTTP APIs and the commands. Imports neither torch nor transformers."""

from schema.version import VERSION as __version__

__all__ = ["__version__"]
