"""How the manager reaches its nodes: links, the agent of this machine, and the checkpoints' text assets."""
