"""What proves to the agent that a process is its kin."""

from __future__ import annotations

from agent.config import NodeConfig
from schema.errors import InvalidInput

__all__ = ["kin_token"]


def kin_token(config: NodeConfig) -> str:
    """The token that the agent left in its run directory. Raises InvalidInput when it cannot be read."""
    try:
        return config.token_path.read_text().strip()
    except OSError as error:
        raise InvalidInput(f"cannot read the agent's token {config.token_path}: {error.strerror}") from error
