"""Makes loading-optimised checkpoints of Hugging Face models, in a child process of the agent's."""
