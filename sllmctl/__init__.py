"""The manager: state, scheduling, the HTTP APIs and the commands. Imports neither torch nor transformers."""
