"""The version of this software; in the ground package, because every process says it in its handshake."""

__all__ = ["VERSION"]

VERSION = "0.1.0"
