"""The loop that owns cluster state, and what carries its effects out."""
