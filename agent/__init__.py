"""The node: agent, store, zygote and workers. Never imports sllmctl."""
