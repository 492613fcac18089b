"""The manager: state, scheduling, the HTTP APIs and the commands. Imports neither torch nor transformers."""

from schema.version import VERSION

__all__ = ["__version__"]

__version__ = VERSION
